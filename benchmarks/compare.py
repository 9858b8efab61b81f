"""Seconds per step and per picture of our runtime and its peers, in one run.

```
python -m allaprima.benchmarks.compare --model shapes
```
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from allaprima.benchmarks.checkpoints import SHAPES
from allaprima.benchmarks.contestants import CONTESTANTS, REFERENCE, Contestant, Model, Settings
from allaprima.benchmarks.process import in_new_process
from allaprima.benchmarks.report import RESULTS, stamp, table, write_result
from allaprima.benchmarks.trials import Trial, psnr, run_trial, summarise
from allaprima.bundle import AllaprimaError, RequestError, open_bundle
from allaprima.cli.machine import read_machine
from allaprima.cli.output import show_bytes
from allaprima.runtime.cuda import current_device

PROMPT = "a red circle above a blue square on a white background"


@dataclass(frozen=True)
class Plan:
    """Every contestant in turn, A B A B, `rounds` times, with `repeats` pairs of pictures in each turn.

    `steps` are those of a pair. RequestError where nothing could be measured.
    """

    steps: tuple[int, int]
    rounds: int
    repeats: int

    def __post_init__(self) -> None:
        few, many = self.steps
        if not (1 <= few < many and self.rounds >= 1 and self.repeats >= 1):
            raise RequestError(f"{self}: needs 1 <= few < many steps, at least 1 round and 1 repeat")


@dataclass
class Outcome:
    """What came of one contestant; one that failed has the reason, and is not asked again."""

    contestant: Contestant
    picture: Path
    trials: list[Trial] = field(default_factory=list)
    error: str = ""


def measure(
    contestants: Sequence[Contestant],
    model: Model,
    settings: Settings,
    plan: Plan,
    folder: Path,
    *,
    tell: Callable[[str], None] = lambda line: None,
    keep: Callable[[list[Outcome]], object] = lambda outcomes: None,
) -> list[Outcome]:
    """Measure all contestants in turns; their pictures go to `folder`.

    `keep` is given everything so far after every turn, so that what was measured outlives a run cut short.
    """
    outcomes = [Outcome(each, folder / f"{each.name}.png") for each in contestants]
    for number in range(plan.rounds):
        for outcome in outcomes:
            if outcome.error:
                continue
            name, arguments = outcome.contestant.name, (model, settings, plan.steps, plan.repeats)
            try:
                trial = in_new_process(run_trial, outcome.contestant, *arguments, outcome.picture)
            except BrokenProcessPool:
                outcome.error = "the process was killed, perhaps for want of memory"
            except Exception as error:  # a peer that is missing or broken is a result, not the end
                outcome.error = f"{type(error).__name__}: {error}"
            else:
                outcome.trials.append(trial)
            tell(f"round {number + 1} of {plan.rounds}: {name}: {outcome.error or 'done'}")
            keep(outcomes)
    return outcomes


def describe(outcomes: Sequence[Outcome], steps: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """The results by name, as they go into JSON; `psnr` is against REFERENCE's picture.

    Contestants that had no turn yet are left out.
    """
    outcomes = [each for each in outcomes if each.trials or each.error]
    pictures = {each.contestant.name: each.picture for each in outcomes if not each.error}
    reference = pictures.get(REFERENCE)
    found: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        contestant = outcome.contestant
        about = {"precision": contestant.precision, "weights": contestant.weights}
        if outcome.error:
            found[contestant.name] = {**about, "error": outcome.error}
            continue
        found[contestant.name] = {
            **about,
            **asdict(summarise(outcome.trials, steps)),
            "psnr": None if reference in (None, outcome.picture) else psnr(outcome.picture, reference),
            "trials": [asdict(trial) for trial in outcome.trials],
        }
    return found


def tabulate(results: Mapping[str, Mapping[str, Any]], steps: tuple[int, int]) -> list[str]:
    """The results as a markdown table, fastest picture first; those that failed are named below it."""
    worked = {name: result for name, result in results.items() if "error" not in result}
    rows = [
        (
            name,
            _show(result["step"]),
            _show(result["picture"]),
            show_bytes(result["memory"]),
            "–" if result["psnr"] is None else f"{result['psnr']:.1f} dB",
        )
        for name, result in sorted(worked.items(), key=lambda item: item[1]["picture"]["median"])
    ]
    head = (
        "contestant",
        "s per step",
        f"s per picture, {steps[1]} steps",
        "peak memory",
        f"PSNR to {REFERENCE}",
    )
    failed = [f"{name} failed: {results[name]['error']}" for name in results.keys() - worked.keys()]
    return [*table(head, rows), "", "Median (smallest – largest).", *sorted(failed)]


def _show(spread: Mapping[str, float]) -> str:
    return "{median:.3g} ({minimum:.3g} – {maximum:.3g})".format(**spread)


def export_bundles(model: Model, precisions: Sequence[str], tell: Callable[[str], None]) -> None:
    """Make the bundles that are missing, or older than the checkpoint or the exporter.

    Raises:
        ExportError: the checkpoint cannot be exported.
    """
    exporter = Path(__file__).resolve().parents[1] / "export"
    inputs = [*model.checkpoint.rglob("*"), *exporter.rglob("*.py")]
    for precision in precisions:
        made = model.bundle(precision) / "bundle.json"
        if not made.is_file() or any(each.stat().st_mtime > made.stat().st_mtime for each in inputs):
            tell(f"exporting {model.name} in {precision}")
            in_new_process(_export, model, precision)


def _export(model: Model, precision: str) -> None:
    from allaprima.export import export_checkpoint

    export_checkpoint(str(model.checkpoint), model.bundle(precision), precision=precision, overwrite=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    command = f"python -m allaprima.benchmarks.compare {shlex.join(arguments)}"
    try:
        print(_compare(options, command))
    except AllaprimaError as error:
        parser.error(str(error))


def _compare(options: argparse.Namespace, command: str) -> str:
    chosen = _chosen(options.contestants, gpu=options.gpu)
    model = Model(SHAPES if options.model == "shapes" else Path(options.model).resolve(), options.bundles)
    plan = Plan(tuple(options.steps), options.rounds, options.repeats)
    # The plainest bundle is always there, since it knows the model's size and guidance.
    needed = dict.fromkeys(["fp16", *(each.weights for each in chosen if each.weights)])
    export_bundles(model, list(needed), _tell)
    settings = _settings(options, model)
    # Engines that a user built may be of other threads: everybody starts from the graphs.
    os.environ["ALLAPRIMA_CACHE"] = str(options.bundles / "no-engines")
    introduction = (
        f"{model.name}, {settings.width} × {settings.height}, batch 1, {settings.sampler}, "
        f"guidance {settings.guidance_scale:g}, rounds: {plan.rounds}, pairs in each: {plan.repeats}."
    )
    about = {
        **stamp(command, model.name, settings.threads),
        "settings": asdict(settings),
        "plan": asdict(plan),
    }

    def write(outcomes: list[Outcome]) -> str:
        results = describe(outcomes, plan.steps)
        lines = [introduction, "", *tabulate(results, plan.steps)]
        name = options.name or _name(model, gpu=options.gpu)
        return write_result(options.results, name, {**about, "contestants": results}, lines)

    with tempfile.TemporaryDirectory() as folder:
        return write(measure(chosen, model, settings, plan, Path(folder), tell=_tell, keep=write))


def _chosen(names: Sequence[str] | None, *, gpu: bool) -> list[Contestant]:
    if names is not None:
        return [CONTESTANTS[name] for name in names]
    return [each for each in CONTESTANTS.values() if each.gpu == gpu or each.name == REFERENCE]


def _name(model: Model, *, gpu: bool) -> str:
    if not gpu:
        return model.name
    device = re.sub(r"[^a-z0-9]+", "-", current_device().name.lower()).strip("-")
    return device if model.name == "shapes" else f"{device}-{model.name}"


def _settings(options: argparse.Namespace, model: Model) -> Settings:
    defaults = open_bundle(model.bundle("fp16")).manifest.defaults
    width, height = options.size or (defaults.width, defaults.height)
    guidance = defaults.guidance_scale if options.guidance is None else options.guidance
    return Settings(PROMPT, options.sampler, options.seed, guidance, height, width, options.threads)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allaprima.benchmarks.compare",
        description="Seconds per step and per picture of our runtime and its peers, in one run.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="shapes|DIR", help="our small model, or a diffusers folder")
    add("--contestants", nargs="+", choices=CONTESTANTS, metavar="NAME", help="(all of the CPU)")
    add("--gpu", action="store_true", help="all of the GPU instead; the result is named after it")
    add("--steps", nargs=2, type=int, default=[2, 20], metavar=("FEW", "MANY"), help="of a pair (2 20)")
    add("--rounds", type=int, default=3, help="times that each contestant has its turn (3)")
    add("--repeats", type=int, default=1, help="pairs of pictures in a turn (1)")
    add("--size", type=_size, metavar="WxH", help="in pixels (the model's own)")
    add("--guidance", type=float, help="guidance scale (the model's own)")
    add("--sampler", default="dpmpp_2m", help="see: allaprima samplers (dpmpp_2m)")
    add("--seed", type=int, default=7)
    add("--threads", type=int, default=read_machine().cores, help="for everybody (all cores)")
    add("--bundles", type=Path, default=Path("build/benchmarks"), help="where bundles are made and kept")
    add("--results", type=Path, default=RESULTS, help="where results go")
    add("--name", help="of the result (the model's)")
    return parser


def _size(text: str) -> tuple[int, int]:
    width, height = map(int, text.split("x"))
    return width, height


if __name__ == "__main__":
    main()
