"""The report of a result: `report.md` with its tables and plots, as GitHub shows it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from allaprima.benchmarks import sections
from allaprima.benchmarks.arithmetic import Interval
from allaprima.benchmarks.plan import side_by_side
from allaprima.benchmarks.plots import embed, plot_all
from allaprima.benchmarks.report import describe_machine, table
from allaprima.benchmarks.result import Result
from allaprima.benchmarks.sections import folded
from allaprima.benchmarks.summary import Row, against, fits, rows
from allaprima.bundle import RequestError

FILE = "report.md"


def write_report(result: Result, folder: Path) -> tuple[Path, str]:
    """Write the report and its plots; where it is, and why there are no plots ("" if there are)."""
    try:
        drawn, missing = plot_all(result, folder), ""
    except RequestError as error:
        drawn, missing = [], str(error)
    lines = [
        f"# Benchmark of {result['model']}",
        "",
        *_incomplete(result),
        *sections.notes(result),
        *_results(result),
        *_plots(drawn),
        *_stages(rows(result)),
        *_fits(result),
        *sections.costs(result),
        *sections.cold(result),
        *sections.roofline(result),
        *sections.scenarios(result),
        *sections.quality(result),
        *sections.absent(result),
        *_how(result),
    ]
    if missing:
        lines += ["", f"Plots are missing: {missing}."]
    path = folder / FILE
    partial = folder / f".{FILE}.partial"
    try:
        partial.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from error
    return path, missing


def _incomplete(result: Result) -> list[str]:
    if result["complete"]:
        return []
    why = result["stopped"] or "it was killed"
    return [f"> **Incomplete.** The run did not reach its end: {why}. What it had measured is below.", ""]


HEAD = (
    "contestant",
    "steps",
    "batch",
    "size",
    "p50 s",
    "p90 s",
    "p99 s",
    "pictures/s",
    "s/step",
    "not engine",
    "n",
)


def result_rows(found: Sequence[Row]) -> list[tuple[str, ...]]:
    """The main table, under `HEAD`: for the terminal and for the report."""
    lines = {(fit.contestant, fit.batch, fit.width, fit.height): fit.line for fit in fits(found)}
    cells = []
    for row in found:
        work = row.work
        line = lines.get((row.contestant, *work.shape))
        cells.append(
            (
                row.contestant,
                str(work.steps),
                str(work.batch),
                f"{work.width}x{work.height}",
                *(f"{value:.3g}" for value in (row.median, row.at(90), row.at(99), row.rate)),
                _step(row, line.per_step if line else None),
                _overhead(row),
                str(len(row.seconds)),
            )
        )
    return cells


def _overhead(row: Row) -> str:
    return "–" if row.overhead is None else f"{100 * row.overhead:.2g} %"


def _step(row: Row, fitted: float | None) -> str:
    """Seconds a step: the stage's if it is known, else the line's."""
    if "denoise" in row.stages:
        return f"{row.stages['denoise'] / row.work.steps:.3g}"
    return "–" if fitted is None else f"{fitted:.3g}"


def _results(result: Result) -> list[str]:
    """The configurations that stand side by side; all of them only for who unfolds them."""
    found = rows(result)
    if not found:
        return []
    shape = side_by_side(row.work for row in found).shape
    shown = [row for row in found if row.work.shape == shape]
    lines = [*table(HEAD, result_rows(shown)), "", *_ratios(result, found)]
    if len(shown) < len(found):
        lines += folded("All configurations", table(HEAD, result_rows(found)))
    return lines


def _ratios(result: Result, found: Sequence[Row]) -> list[str]:
    """Every contestant against the first, and peers against all of ours, at the steps shown side by side."""
    named = {name: each for name, each in result["contestants"].items() if each["turns"]}
    if len(named) < 2:
        return []
    steps = side_by_side(row.work for row in found).steps
    shown = [row for row in found if row.work.steps == steps]
    peers = {name for name, each in named.items() if each.get("bundle") is None}
    first, *others = named
    lines: list[str] = []
    for base, compared in ((first, set(others)), *((name, peers) for name in others if name not in peers)):
        ratios = against([row for row in shown if row.contestant in {base, *compared}], base)
        cells = [
            (name, str(work), f"{each.ratio:.2f} ({_ends(each)})") for (name, work), each in ratios.items()
        ]
        head = ("contestant", "configuration", f"latency over {base} (95 % interval)")
        lines += [*table(head, cells), ""] if cells else []
    return lines


def _ends(interval: Interval) -> str:
    return "one round" if math.isnan(interval.low) else f"{interval.low:.2f} – {interval.high:.2f}"


def _stages(found: Sequence[Row]) -> list[str]:
    names = ("text", "denoise", "decode", "transfer", "png")
    shown = [name for name in names if any(name in row.stages for row in found)]
    mine = [row for row in found if row.overhead is not None]
    if not mine:
        return []
    cells = [
        (
            row.contestant,
            str(row.work),
            *(f"{1e3 * row.stages[name]:.3g}" if name in row.stages else "–" for name in shown),
            _overhead(row),
        )
        for row in mine
    ]
    head = ("contestant", "configuration", *(f"{name}, ms" for name in shown), "not engine")
    note = (
        "Medians for the whole batch; PNG for one picture, and not in the latency. *Not engine* "
        "is the share of the latency that is neither a graph's nor a copy's."
    )
    return folded("Stages of all configurations", [*table(head, cells), "", note])


def _plots(drawn: Iterable[tuple[str, str]]) -> list[str]:
    lines = []
    for name, title in drawn:
        lines += [f"## {title}", "", *embed(name, title), ""]
    return lines


def _fits(result: Result) -> list[str]:
    cells = [
        (
            fit.contestant,
            f"batch {fit.batch}, {fit.width}x{fit.height}",
            f"{fit.line.fixed:.3g}",
            f"{fit.line.per_step:.3g}",
            "–" if fit.line.residual is None else f"{100 * fit.line.residual:.2g} %",
        )
        for fit in fits(rows(result))
    ]
    head = ("contestant", "shape", "fixed, s", "per step, s", "residual")
    return ["## Latency = fixed + per step × steps", "", *table(head, cells), ""] if cells else []


def _how(result: Result) -> list[str]:
    plan = result["plan"]
    settings = plan["settings"]
    return [
        "## How",
        "",
        f"{plan['rounds']} rounds, contestants in turn, each turn a process of its own that warms up and "
        f"paints every configuration {plan['repeats']} times; "
        f"sampler {settings['sampler'] or 'the model’s own'}, guidance {settings['guidance_scale']:g}, "
        f"seed {settings['seed']}, “{settings['prompt']}”.",
        "",
        describe_machine(result),
        *(
            f"{name} ran beside {', '.join(f'{library} {version}' for library, version in versions.items())}."
            for name, each in result["contestants"].items()
            if (versions := each.get("versions"))
        ),
        "",
        f"    {result['command']}",
    ]
