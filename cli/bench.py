"""`allaprima bench`: what decides between runtimes, measured; and two measurements compared."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from allaprima.bundle import BackendError, RequestError
from allaprima.cli import compare, quality
from allaprima.cli.output import add_json, add_quiet, print_json, print_table, print_warnings, progress_bar

if TYPE_CHECKING:
    from allaprima.benchmarks.harness import Measured
    from allaprima.benchmarks.lineup import Asked, Lineup
    from allaprima.benchmarks.result import Result


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.usage = (
        "allaprima bench [BUNDLE ...] [options]\n"
        "       allaprima bench compare A B [options]\n"
        "       allaprima bench quality [BUNDLE ...] [options]"
    )
    parser.description = (
        "Measures latency, throughput, memory and the distance from the machine's limit, our backends and "
        "other libraries in turn; or says what changed between two results (exit code 1: it is slower, or "
        "lacks something)."
    )
    parser.add_argument(
        "words",
        metavar="BUNDLE",
        nargs="*",
        help="folders or built-in names (shapes); or: compare, and two results or their folders",
    )
    _add_work(parser)
    _add_contestants(parser)
    _add_scenarios(parser)
    compare.add_arguments(parser)
    quality.add_arguments(parser)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="folder of the report (bench-NAME)")
    add_json(parser)
    add_quiet(parser)


def _add_work(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is painted")
    add = group.add_argument
    add("--steps", metavar="N,...", type=_numbers, default=(), help="denoising steps (1,4,8,20,30,50)")
    add("--sizes", metavar="WxH,...", help="in pixels (the model's own)")
    add("--batch", metavar="N,...", type=_numbers, default=(1,), help="pictures at once (1)")
    add("--guidance", metavar="SCALE", type=float, help="guidance scale (the model's own)")
    add("--sampler", metavar="NAME", help="see: allaprima samplers (euler, or the model's own)")
    add("--seed", metavar="N", type=int, default=7, help="of the first picture (7)")
    add("--rounds", metavar="N", type=int, default=3, help="turns of each contestant (3)")
    add("--repeats", metavar="N", type=int, default=3, help="of each configuration in a turn (3)")
    add("--cold", metavar="N", type=int, default=3, help="first pictures of new processes; 0 is none (3)")
    add("--no-roofline", action="store_true", help="do not measure what the machine can do")


def _add_contestants(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who paints")
    add = group.add_argument
    add(
        "--backend",
        metavar="NAME,...",
        type=_words,
        default=("auto",),
        help="our own; all is what works (auto)",
    )
    add(
        "--precision",
        metavar="NAME,...",
        type=_words,
        default=(),
        help="fp32, fp16, bf16 (the backend's best)",
    )
    add("--fixed", action="store_true", help="with openvino, engines for these shapes alone besides")
    add("--threads", metavar="N", type=int, help="of the CPU, for everybody (all cores)")
    add(
        "--vs",
        metavar="NAME,...",
        type=_words,
        default=(),
        help="other libraries: diffusers, diffusers-compile, ort, openvino-genai, optimum-onnx, "
        "optimum-intel, stable-diffusion-cpp; NAME:PRECISION for one precision of it",
    )
    add(
        "--peer-python",
        metavar="NAME=PYTHON",
        action="append",
        default=[],
        help="the interpreter of a library that cannot be installed beside ours",
    )
    add("--checkpoint", metavar="DIR", type=Path, help="the bundle's diffusers folder, for other libraries")


def _add_scenarios(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it is asked")
    add = group.add_argument
    add(
        "--scenario",
        metavar="NAME,...",
        type=_words,
        default=("latency",),
        help="latency (the table of configurations), single-stream, offline, server (latency)",
    )
    add("--latency", metavar="SECONDS", type=float, help="the server's bound for 99 %% of its queries")
    add("--queries", metavar="N", type=int, default=100, help="of each scenario (100)")
    add("--no-loadgen", action="store_true", help="do not repeat scenarios with mlcommons-loadgen")


def run(options: argparse.Namespace) -> int | None:
    """Measure or compare."""
    if options.words[:1] == [compare.COMPARE]:
        return compare.run(options)
    _name_interpreters(options.peer_python)
    if options.words[:1] == [quality.QUALITY]:
        return _quality(options)
    return _measure(options)


def _name_interpreters(given: Iterable[str]) -> None:
    """Take NAME=PYTHON to where peers look for it. Raises RequestError."""
    from allaprima.benchmarks.contestants import PEERS
    from allaprima.benchmarks.peer_worker import variable

    for word in given:
        name, _, python = word.partition("=")
        if name not in PEERS or not python:
            raise RequestError(f"peer-python is '{word}': write NAME=PYTHON, NAME one of {', '.join(PEERS)}")
        os.environ[variable(name)] = python


def _quality(options: argparse.Namespace) -> int | None:
    from allaprima.benchmarks.lineup import line_up

    options.words = options.words[1:]
    return quality.run(options, lambda: line_up(_asked(options), table=False))


def _measure(options: argparse.Namespace) -> int | None:
    from allaprima.benchmarks.harness import Harness
    from allaprima.benchmarks.lineup import line_up
    from allaprima.benchmarks.process import reason_of
    from allaprima.benchmarks.result import new_result, write

    lineup = line_up(_asked(options), table="latency" in options.scenario)
    measured = _measured(options, lineup)
    folder = options.output or Path(f"bench-{lineup.name}")
    result = new_result(f"allaprima {shlex.join(sys.argv[1:])}", lineup.name, lineup.plan)
    result["absent"].update(lineup.absent)
    result["notes"] += lineup.notes
    write(folder, result)
    stopped: BaseException | None = None
    with progress_bar(quiet=options.quiet) as report, _terminated():
        harness = Harness(
            result,
            lineup.contestants,
            lineup.plan,
            keep=lambda: write(folder, result),
            tell=report,
            reference=lineup.reference,
        )
        try:
            harness.run(measured)
        except BaseException as error:  # whatever it is, what was measured is told first
            interrupted = isinstance(error, KeyboardInterrupt)
            result["stopped"] = "it was interrupted" if interrupted else f"it failed: {reason_of(error)}"
            stopped = error
            write(folder, result)
    _tell(options, result, lineup, folder)
    if stopped is not None:
        raise stopped
    if not any(each["turns"] for each in result["contestants"].values()) and not result["scenarios"]:
        reasons = "; ".join(f"{name}: {why}" for name, why in result["absent"].items())
        raise BackendError(f"nothing could be measured: {reasons}")
    return None


def _measured(options: argparse.Namespace, lineup: Lineup) -> Measured:
    """What the options ask for. Raises RequestError."""
    from allaprima.benchmarks import scenarios
    from allaprima.benchmarks.harness import Measured

    names = tuple(name for name in options.scenario if name != "latency")
    asked = None
    if names:
        asked = scenarios.Traffic(names, options.queries, options.latency, not options.no_loadgen)
    if options.cold < 0:
        raise RequestError(f"cold is {options.cold}: give 0 or more")
    captions = () if options.captions is None else tuple(quality.captions(options, lineup))
    return Measured("latency" in options.scenario, options.cold, not options.no_roofline, asked, captions)


def _asked(options: argparse.Namespace) -> Asked:
    from allaprima.benchmarks.lineup import Asked
    from allaprima.engine import parse_sizes

    return Asked(
        bundles=tuple(options.words) or ("shapes",),
        steps=options.steps,
        sizes=() if options.sizes is None else tuple(parse_sizes(options.sizes)),
        batches=options.batch,
        backends=options.backend,
        precisions=options.precision,
        peers=options.vs,
        checkpoint=options.checkpoint,
        fixed=options.fixed,
        sampler=options.sampler,
        guidance=options.guidance,
        seed=options.seed,
        threads=options.threads,
        rounds=options.rounds,
        repeats=options.repeats,
    )


@contextmanager
def _terminated() -> Iterator[None]:
    """A request to end (`kill`) is taken as Ctrl-C: what was measured is kept, and the report says so."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread, so nobody ends us that way
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(options: argparse.Namespace, result: Result, lineup: Lineup, folder: Path) -> None:
    from allaprima.benchmarks.page import HEAD, result_rows, write_report
    from allaprima.benchmarks.sections import scenario_rows
    from allaprima.benchmarks.summary import rows

    path, missing = write_report(result, folder)
    if options.json:
        print_json(result)
    if options.quiet:
        return
    print_warnings([f"{name} was not measured: {why}" for name, why in result["absent"].items()])
    print_warnings(result["notes"])
    if missing:
        print_warnings([missing])
    if options.json:
        return
    found = rows(result)
    if found:
        print_table(HEAD, result_rows(found))
    if result["scenarios"]:
        print_table(*scenario_rows(result))
    print(path)


def _numbers(text: str) -> tuple[int, ...]:
    words = _words(text)
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers: write them as 1,4,8")
    return tuple(map(int, words))


def _words(text: str) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    if not all(words):
        raise argparse.ArgumentTypeError(f"'{text}' is no list: write names with commas between them")
    return words
