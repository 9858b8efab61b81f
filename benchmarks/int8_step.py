"""How long a denoising step takes in int8 and in float, the two taking turns.

```
python -m allaprima.benchmarks.int8_step BUNDLE INT8_BUNDLE --size 512x512
```

Times do not depend on the values of weights, so bundles of random ones will do.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

import numpy as np

from allaprima.benchmarks.report import RESULTS, stamp, table, write_result
from allaprima.bundle import AllaprimaError, Bundle, EngineFile, Profile, RequestError, open_bundle
from allaprima.cli.machine import read_machine
from allaprima.cli.output import parse_size
from allaprima.engine.shapes import fixed_profiles
from allaprima.engine.verify import draw_inputs
from allaprima.runtime import Binding, Session
from allaprima.runtime.backends import compile_engine, engine_precision, fixes, open_session

DENOISER = "denoiser"


def open_step(
    bundle: Bundle, backend: str, precision: str | None, threads: int, profile: Profile, folder: Path
) -> Session:
    """A session of the denoiser, compiled for one shape where the backend can. Raises BackendError."""
    component = bundle.component(DENOISER)
    graph = bundle.path(component.graph)
    engines = []
    if fixes(backend):
        folder.mkdir()
        engine = compile_engine(graph, component, folder, backend, precision=precision, profile=profile)
        engines.append(EngineFile(engine, (profile,)))
    return open_session(
        graph,
        component,
        backend,
        precision=precision,
        threads=threads,
        engines=engines,
        memory_limit=sys.maxsize if engines else None,  # else the graph would be compiled for all shapes too
    )


def bind(bundle: Bundle, session: Session, profile: Profile) -> Binding:
    """One step of random inputs, as a pipeline paints one picture with guidance."""
    extents = {axis: best for axis, (_, best, _) in profile.extents.items()}
    specs = (*session.inputs.values(), *session.outputs.values())
    block = session.memory.allocate({spec.name: (spec.resolve(extents), spec.dtype) for spec in specs})
    for name, array in draw_inputs(bundle.component(DENOISER), extents, 1).items():
        block.tensors[name].array[...] = array
    block.push()
    return session.bind(block.tensors)


def take_turns(bindings: dict[str, Binding], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run: every binding once in each round, after one that is not counted."""
    for binding in bindings.values():
        binding.run()
    seconds: dict[str, list[float]] = {name: [] for name in bindings}
    for _ in range(rounds):
        for name, binding in bindings.items():
            begin = perf_counter()
            binding.run()
            seconds[name].append(perf_counter() - begin)
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="in float")
    parser.add_argument("quantized", type=Path, help="the same in int8")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--precision", help="of all that is not int8 (the backend's best)")
    parser.add_argument("--size", type=parse_size, default=(512, 512), help="of the picture (512x512)")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each (9)")
    parser.add_argument("--note", default="", help="what a reader should know of the machine's state")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}: give at least 1")
    command = shlex.join(["python", "-m", "allaprima.benchmarks.int8_step", *arguments])
    try:
        print(_measure(options, command))
    except AllaprimaError as error:
        parser.error(str(error))


def _measure(options: argparse.Namespace, command: str) -> str:
    threads = read_machine().cores
    with tempfile.TemporaryDirectory(prefix="allaprima-int8-") as folder, ExitStack() as opened:
        bindings: dict[str, Binding] = {}
        for path in (options.bundle, options.quantized):
            bundle = open_bundle(path)
            made = bundle.component(DENOISER).quantization
            precision = engine_precision(bundle.component(DENOISER), options.backend, options.precision)
            name = precision if made is None else f"{made.dtype}+{precision}"
            profile = fixed_profiles(bundle, [options.size], 1)[DENOISER][0]
            work = Path(folder) / name
            session = open_step(bundle, options.backend, precision, threads, profile, work)
            opened.callback(session.close)
            bindings[name] = bind(bundle, session, profile)
        if len(bindings) != 2:
            raise RequestError(
                f"{options.bundle} and {options.quantized} both compute in {next(iter(bindings))}"
            )
        seconds = take_turns(bindings, options.rounds)
    return _write(options, command, threads, seconds)


def _write(options: argparse.Namespace, command: str, threads: int, seconds: dict[str, list[float]]) -> str:
    plain, quantized = seconds.values()
    ratios = [one / other for one, other in zip(plain, quantized, strict=True)]
    ends = np.percentile(ratios, (10, 90))
    model, (width, height) = options.bundle.absolute().name, options.size
    lines = [
        f"{model}: one step of one {width}x{height} picture with guidance, {options.backend}, the two taking "
        f"turns {options.rounds} times. {options.note}".rstrip(),
        "",
        *table(
            ["denoiser", "median step", "fastest"],
            [
                [name, f"{statistics.median(each):.3f} s", f"{min(each):.3f} s"]
                for name, each in seconds.items()
            ],
        ),
        "",
        f"int8 is {statistics.median(ratios):.2f} times as fast, the median of {options.rounds} pairs (four "
        f"in five are between {ends[0]:.2f} and {ends[1]:.2f}).",
    ]
    about = {**stamp(command, model, threads), "backend": options.backend, "note": options.note}
    result = {**about, "width": width, "height": height, "seconds": seconds, "ratios": ratios}
    return write_result(options.results, f"int8-step-{model}-{options.backend}", result, lines)


if __name__ == "__main__":
    main()
