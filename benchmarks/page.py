"""The report of a result: `report.md` with its tables and plots, as GitHub shows it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from allaprima.benchmarks.arithmetic import Interval
from allaprima.benchmarks.plan import side_by_side
from allaprima.benchmarks.plots import embed, plot_all
from allaprima.benchmarks.report import describe_machine, table
from allaprima.benchmarks.result import Result, read_work
from allaprima.benchmarks.roofline import points
from allaprima.benchmarks.summary import Row, against, costs, fits, rows
from allaprima.bundle import RequestError
from allaprima.cli.output import show_bytes

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
        *_results(result),
        *_plots(drawn),
        *_stages(rows(result)),
        *_fits(result),
        *_costs(result),
        *_cold(result),
        *_roofline(result),
        *_scenarios(result),
        *_quality(result),
        *_absent(result),
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
        lines += _folded("All configurations", table(HEAD, result_rows(found)))
    return lines


def _folded(title: str, lines: Sequence[str]) -> list[str]:
    return ["<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>", ""]


def _ratios(result: Result, found: Sequence[Row]) -> list[str]:
    """Every contestant against the first, at the number of steps that is shown side by side."""
    names = [name for name, each in result["contestants"].items() if each["turns"]]
    if len(names) < 2:
        return []
    shown = side_by_side(row.work for row in found).steps
    ratios = against([row for row in found if row.work.steps == shown], names[0])
    cells = [(name, str(work), f"{each.ratio:.2f} ({_ends(each)})") for (name, work), each in ratios.items()]
    head = ("contestant", "configuration", f"latency over {names[0]} (95 % interval)")
    return [*table(head, cells), ""] if cells else []


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
    return _folded("Stages of all configurations", [*table(head, cells), "", note])


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


def _costs(result: Result) -> list[str]:
    cells = [
        (each.contestant, _seconds(each.load), _bytes(each.memory), _bytes(each.device_memory))
        for each in costs(result)
    ]
    head = ("contestant", "load, s", "peak memory", "device memory")
    return ["## Loading and memory", "", *table(head, cells), ""] if cells else []


def _cold(result: Result) -> list[str]:
    cells = []
    for each in result["cold"]:
        seconds, memory = each.get("seconds"), each.get("memory")
        if seconds:
            shown = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} – {max(seconds):.2f})"
            cells.append(
                (each["contestant"], each["kind"] or "–", shown, _bytes(round(statistics.median(memory))))
            )
        else:
            cells.append((each["contestant"], each["kind"] or "–", each.get("error", "not run"), ""))
    if not cells:
        return []
    title = f"## From the start of a process to its first picture, {result['cold'][0]['steps']} steps"
    head = ("contestant", "start", "s (smallest – largest)", "peak memory")
    return [title, "", *table(head, cells), ""]


def _roofline(result: Result) -> list[str]:
    cells = [
        (
            point.contestant,
            point.component,
            f"batch {point.work.batch}, {point.work.width}x{point.work.height}",
            f"{point.operations / 1e9:.3g}",
            f"{point.intensity:.3g}",
            f"{point.rate / 1e9:.3g}",
            f"{100 * point.share:.0f} %",
        )
        for point in points(result)
    ]
    if not cells:
        return []
    head = ("contestant", "component", "shape", "10⁹ operations", "per byte", "10⁹ a second", "of the limit")
    how = sorted({each["how"] for each in result["rates"] if "error" not in each})
    refused = {
        f"{each['backend']} {each['precision']}: {each['error']}"
        for each in result["rates"]
        if "error" in each
    }
    return [
        *("## Distance from the machine's limit", "", *table(head, cells), ""),
        "The limit is min(rate of products, operations per byte × bandwidth), both measured in this run: "
        f"{'; '.join(how)}. Counted are matrix products, convolutions and attention.",
        *[f"Not measured: {each}." for each in sorted(refused)],
        "",
    ]


def scenario_rows(result: Result) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the table of scenarios: for the terminal and for the report."""
    cells: list[tuple[str, ...]] = []
    for each in result["scenarios"]:
        shape = f"{each['steps']} steps, {each['width']}x{each['height']}, up to {each['batch']} at once"
        begin = each["contestant"], each["scenario"], each["generator"], shape
        if "error" in each:
            cells.append((*begin, each["error"], *[""] * 5))
            continue
        asked = "–" if each.get("rate") is None else f"{each['rate']:.3g}"
        numbers = [f"{each[name]:.3g}" for name in ("throughput", "mean", "p50", "p90", "p99")]
        cells.append((*begin, asked, *numbers))
    columns = ("asked/s", "done/s", "mean s", "p50 s", "p90 s", "p99 s")
    return ("contestant", "scenario", "generator", "work", *columns), cells


def _scenarios(result: Result) -> list[str]:
    if not result["scenarios"]:
        return []
    bounds = sorted({each["bound"] for each in result["scenarios"] if each.get("bound")})
    note = [
        f"The server's rate is the largest found of which 99 % of the queries were done within {bound:g} s."
        for bound in bounds
    ]
    return ["## Scenarios", "", *table(*scenario_rows(result)), "", *note, *_agreement(result), ""]


def _agreement(result: Result) -> list[str]:
    """LoadGen's figures over our own generator's, where both measured."""
    done = [each for each in result["scenarios"] if "error" not in each]
    own = {(each["contestant"], each["scenario"]): each for each in done if each["generator"] == "own"}
    cells = []
    for each in done:
        key = each["contestant"], each["scenario"]
        if each["generator"] != "own" and key in own:
            ratios = [each[name] / own[key][name] for name in ("throughput", "mean", "p50", "p99")]
            cells.append((*key, *(f"{ratio:.2f}" for ratio in ratios)))
    head = ("contestant", "scenario", "done/s", "mean", "p50", "p99")
    return ["", "LoadGen over our own generator:", "", *table(head, cells)] if cells else []


def _quality(result: Result) -> list[str]:
    from allaprima.benchmarks.scores import HEAD as HEAD_OF_SCORES
    from allaprima.benchmarks.scores import rows as rows_of_scores

    found = result["quality"]
    lines: list[str] = []
    if "psnr" in found:
        similar = found.get("ssim", {})
        cells = [
            (name, f"{value:.1f} dB", f"{similar[name]:.4f}" if name in similar else "–")
            for name, value in found["psnr"].items()
        ]
        head = ("contestant", f"PSNR to {found['reference']}", "SSIM")
        lines += [f"## Quality, {read_work(found)}", "", *table(head, cells), ""]
    if found.get("other"):
        lines += [
            f"Of another picture, for want of the same noise or tokens: {', '.join(found['other'])}.",
            "",
        ]
    if "captions" in found:
        of = found["captions"]
        lines += [
            f"## Quality, {of['count']} captions, {of['steps']} steps",
            "",
            *table(HEAD_OF_SCORES, rows_of_scores(of["scores"])),
            "",
        ]
    return lines


def _absent(result: Result) -> list[str]:
    lines = [f"- {name}: {reason}" for name, reason in result["absent"].items()]
    return ["## Not measured", "", *lines, ""] if lines else []


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
        "",
        f"    {result['command']}",
    ]


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _bytes(value: Any) -> str:
    return "–" if value is None else show_bytes(int(value))
