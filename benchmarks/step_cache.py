"""What step caching costs `shapes`, and what it saves: pictures at several intervals against those in full.

```
python -m allaprima.benchmarks.step_cache
python -m allaprima.benchmarks.step_cache BUNDLE --size 512x512
```

Of another bundle that has the graphs of cached steps only the seconds are measured.

A cached step is not what other libraries compute, so none of this is compared with them.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from allaprima.benchmarks.bundles import Model, export_bundles
from allaprima.benchmarks.checkpoints import SHAPES
from allaprima.benchmarks.likeness import Picture, psnr, spread
from allaprima.benchmarks.plots import COLOURS, Draw, Theme, check_plots, embed, write_plot
from allaprima.benchmarks.report import RESULTS, stamp, table, write_result
from allaprima.bundle import AllaprimaError
from allaprima.cli.machine import read_machine
from allaprima.cli.output import parse_size
from allaprima.models.shapes.checker import score
from allaprima.models.shapes.evaluate import held_out
from allaprima.models.shapes.scenes import Scene
from allaprima.runtime import Pipeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INTERVALS = (1, 2, 3, 5)
"""The first is what the others are measured against."""
BLOCK = 10
"""So many captions are painted at one interval before the next has its turn."""
Painted = tuple[Picture, float]
"""A picture, and the seconds that it took."""


def paint_all(
    pipeline: Pipeline,
    scenes: Sequence[Scene],
    texts: Sequence[str],
    intervals: Sequence[int],
    steps: int,
    tell: Callable[[str], None],
) -> dict[int, list[Painted]]:
    """One picture for each caption and interval, with the caption's place as seed.

    The intervals take turns, so that a change of the machine's mood meets all of them. Each turn begins with
    a picture of two steps that is not counted: buffers are made anew for another interval.
    """
    painted: dict[int, list[Painted]] = {interval: [] for interval in intervals}

    def paint(index: int, interval: int, steps: int) -> Painted:
        result = pipeline.generate(
            texts[index],
            num_inference_steps=steps,
            guidance_scale=2.0,
            seed=index,
            height=scenes[index].height,
            width=scenes[index].width,
            cache_interval=interval,
        )
        return np.asarray(result.images[0]), result.timings["total"]

    for start in range(0, len(scenes), BLOCK):
        tell(f"captions {start + 1} to {min(start + BLOCK, len(scenes))} of {len(scenes)}")
        for interval in intervals:
            paint(start, interval, 2)
            for index in range(start, min(start + BLOCK, len(scenes))):
                painted[interval].append(paint(index, interval, steps))
    return painted


def describe(scenes: Sequence[Scene], painted: Mapping[Any, Sequence[Painted]]) -> dict[str, dict[str, Any]]:
    """The figures of each interval, or other way to paint; the first has no likeness to itself."""
    described: dict[str, dict[str, Any]] = {}
    reference = next(iter(painted.values()))
    for name, mine in painted.items():
        found = score(scenes, lambda index, _: mine[index][0])  # noqa: B023
        figures: dict[str, Any] = {
            "seconds": statistics.median(seconds for _, seconds in mine),
            "things": found.things,
            "relation": found.relation,
        }
        if mine is not reference:
            pairs = zip(mine, reference, strict=True)
            figures["psnr"] = spread([psnr(one, other) for (one, _), (other, _) in pairs])
        described[str(name)] = figures
    return described


def tabulate(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of all intervals."""
    whole = next(iter(results.values()))["seconds"]
    head = ["interval", "seconds a picture", "times as fast", "shapes and colours right", "relations right"]
    head += ["PSNR to full steps: median", "smallest", "below 35 dB"]
    rows = []
    for interval, figures in results.items():
        likeness = figures.get("psnr")
        told = [f"{likeness[key]:.1f} dB" for key in ("median", "smallest")] if likeness else ["–", "–"]
        rows.append(
            [
                interval,
                f"{figures['seconds']:.3f}",
                f"{whole / figures['seconds']:.2f}",
                f"{figures['things']:.1%}",
                f"{figures['relation']:.1%}",
                *told,
                f"{likeness['below 35']}" if likeness else "–",
            ]
        )
    return table(head, rows)


def plot_likeness(results: Mapping[str, Mapping[str, Any]]) -> Draw:
    """PSNR to pictures of full steps against seconds a picture; a line shows what those take."""
    points = [(each["seconds"], each["psnr"], name) for name, each in results.items() if "psnr" in each]
    full = next(each["seconds"] for each in results.values() if "psnr" not in each)

    def draw(axes: Axes, theme: Theme) -> None:
        seconds = [second for second, _, _ in points]
        for key, mark in (("median", "o-"), ("smallest", "v--")):
            shown = [likeness[key] for _, likeness, _ in points]
            axes.plot(seconds, shown, mark, ms=5, lw=1.2, color=COLOURS[0], label=f"{key} picture")
        for second, likeness, name in points:
            axes.annotate(name, (second, likeness["median"]), xytext=(6, 4), textcoords="offset points")
        axes.axvline(full, color=theme.text, lw=1, ls=":", label="every step in full")
        axes.set_ylabel("PSNR to full steps, dB")
        _finish(axes)

    return Draw(3.2, draw)


def plot_score(results: Mapping[str, Mapping[str, Any]]) -> Draw:
    """What the checker finds right against seconds a picture."""

    def draw(axes: Axes, theme: Theme) -> None:
        seconds = [each["seconds"] for each in results.values()]
        kinds = (("things", "shapes and colours", "o-"), ("relation", "relations", "s--"))
        for index, (key, label, mark) in enumerate(kinds):
            shown = [100 * each[key] for each in results.values()]
            axes.plot(seconds, shown, mark, ms=5, lw=1.2, color=COLOURS[index], label=label)
        for name, each in results.items():
            place = each["seconds"], 100 * each["things"]
            axes.annotate(name, place, xytext=(6, 4), textcoords="offset points")
        axes.set_ylabel("pictures that are right, %")
        _finish(axes)
        axes.set_ylim(top=101, bottom=min(90.0, axes.get_ylim()[0]))

    return Draw(3.2, draw)


def _finish(axes: Axes) -> None:
    axes.set_xlabel("seconds a picture; numbers are intervals")
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)


PLOTS = (
    ("psnr", "PSNR against seconds", plot_likeness),
    ("score", "Right pictures against seconds", plot_score),
)
"""The end of a plot's file name, its title, and what prepares it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, help="another one, to be timed only")
    parser.add_argument("--size", type=parse_size, help="of its pictures (the model's own)")
    parser.add_argument("--rounds", type=int, default=3, help="of another bundle, intervals in turn (3)")
    parser.add_argument("--count", type=int, default=300, help="how many held-out captions (300)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (20)")
    parser.add_argument("--intervals", type=int, nargs="+", default=list(INTERVALS), help="the first: 1")
    parser.add_argument("--layers", type=int, default=1, help="shallow layers, as of export (1)")
    parser.add_argument("--backend", help="of the runtime (ort; another bundle's best)")
    parser.add_argument("--precision", help="of weights and arithmetic (fp32; another bundle's best)")
    parser.add_argument("--bundles", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for name in ("count", "steps", "layers", "rounds"):
        if (given := getattr(options, name)) < 1:
            parser.error(f"--{name} is {given}: give at least 1")
    intervals = options.intervals
    if intervals[0] != 1 or len(set(intervals)) < 2 or sorted(set(intervals)) != intervals:
        parser.error(f"--intervals are {intervals}: give 1 and larger ones after it, in order")
    command = shlex.join(["python", "-m", "allaprima.benchmarks.step_cache", *arguments])
    if options.bundle is None:
        options.backend, options.precision = options.backend or "ort", options.precision or "fp32"
    try:
        print(_measure(options, command) if options.bundle is None else _time(options, command))
    except AllaprimaError as error:
        parser.error(str(error))


def _measure(options: argparse.Namespace, command: str) -> str:
    check_plots()
    model = Model(SHAPES, options.bundles, options.layers)
    export_bundles(model, [options.precision], _tell)
    scenes, texts = held_out(options.count)
    threads = read_machine().cores
    with Pipeline.open(
        model.bundle(options.precision), backend=options.backend, precision=options.precision, threads=threads
    ) as pipeline:
        painted = paint_all(pipeline, scenes, texts, options.intervals, options.steps, _tell)
    results = describe(scenes, painted)
    name = f"step-cache-{model.name}"
    options.results.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{model.name}, {options.count} held-out captions, one seed each, {options.steps} steps, guidance 2, "
        f"{options.backend} in {options.precision}, {options.layers} shallow layer"
        f"{'s' * (options.layers > 1)}. Steps between full ones take deep features of the last full one: "
        "**not like for like** with what computes every step.",
        "",
        *tabulate(results),
    ]
    for suffix, title, prepare in PLOTS:
        file = f"{name}-{suffix}"
        write_plot(prepare(results), options.results, file)
        lines += ["", *embed(file, title)]
    about = {**stamp(command, model.name, threads), "captions": options.count, "steps": options.steps}
    about |= {"backend": options.backend, "precision": options.precision, "layers": options.layers}
    return write_result(options.results, name, {**about, "like_for_like": False, "results": results}, lines)


def take_turns(
    paint: Callable[[int, int], float], intervals: Sequence[int], steps: int, rounds: int
) -> dict[int, list[float]]:
    """Seconds that `paint` of an interval and a number of steps takes, intervals in turn.

    Before each picture comes one of two steps that is not counted, as in `paint_all`.
    """
    seconds: dict[int, list[float]] = {interval: [] for interval in intervals}
    for number in range(1, rounds + 1):
        for interval in intervals:
            _tell(f"round {number} of {rounds}, interval {interval}")
            paint(interval, 2)
            seconds[interval].append(paint(interval, steps))
    return seconds


def _time(options: argparse.Namespace, command: str) -> str:
    threads = read_machine().cores
    width, height = options.size or (None, None)
    with Pipeline.open(
        options.bundle,
        backend=options.backend or "auto",
        precision=options.precision,
        threads=threads,
        safety_checker=False,
    ) as pipeline:

        def paint(interval: int, steps: int) -> float:
            return pipeline.generate(
                "a lighthouse at dusk",
                num_inference_steps=steps,
                seed=7,
                width=width,
                height=height,
                cache_interval=interval,
            ).timings["total"]

        seconds = take_turns(paint, options.intervals, options.steps, options.rounds)
        what = f"{pipeline.backend} in {pipeline.precision}"
    model = options.bundle.absolute().name
    rows = []
    for interval, mine in seconds.items():
        ratios = [one / other for one, other in zip(seconds[1], mine, strict=True)]
        spread_of = f"{min(ratios):.2f} to {max(ratios):.2f}" if interval > 1 else "–"
        median = statistics.median
        rows.append([str(interval), f"{median(mine):.3g}", f"{median(ratios):.2f}", spread_of])
    size = "its own size" if options.size is None else f"{width}x{height}"
    lines = [
        f"{model}: one picture of {size} in {options.steps} steps with guidance, {what}, intervals in turn, "
        f"{options.rounds} rounds. **Not like for like** with what computes every step.",
        "",
        *table(["interval", "seconds a picture", "times as fast", "in single rounds"], rows),
    ]
    about = {**stamp(command, model, threads), "steps": options.steps, "size": options.size}
    about |= {"like_for_like": False, "seconds": seconds}
    return write_result(options.results, f"step-cache-seconds-{model}", about, lines)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
