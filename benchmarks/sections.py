"""The sections of a report below its results: markdown lines of each, none where there is nothing to tell."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from allaprima.benchmarks import summary
from allaprima.benchmarks.report import table
from allaprima.benchmarks.result import Result, read_work
from allaprima.benchmarks.roofline import points
from allaprima.cli.output import show_bytes


def costs(result: Result) -> list[str]:
    """Seconds before the first picture, and memory."""
    found = summary.costs(result)
    cells = [
        (
            each.contestant,
            *(_seconds(value) for value in (each.load, each.warm_up)),
            *(_bytes(value) for value in (each.memory, each.device_memory)),
        )
        for each in found
    ]
    head = ("contestant", "load, s", "warm-up, s", "peak memory", "device memory")
    shapes = len({read_work(each).shape for each in result["plan"]["configurations"]})
    note = (
        "Medians over the turns. The warm-up is the first picture, of two steps, "
        f"{'in the one shape' if shapes == 1 else f'in each of {shapes} shapes, together'}: "
        "who compiles while it paints does it there."
    )
    told = [note, ""] if any(each.warm_up is not None for each in found) else []
    return ["## Loading and memory", "", *table(head, cells), "", *told] if cells else []


def cold(result: Result) -> list[str]:
    """First pictures of new processes."""
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


def roofline(result: Result) -> list[str]:
    """How far every component is from the machine's limit."""
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


def scenarios(result: Result) -> list[str]:
    """All that was asked in MLPerf's ways, and whether LoadGen agrees."""
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


def quality(result: Result) -> list[str]:
    """How like the reference's the pictures are, in every configuration that it painted."""
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
        lines += _configurations(found.get("configurations", []), found["reference"])
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


def _configurations(found: Sequence[Mapping[str, Any]], reference: str) -> list[str]:
    if len(found) < 2:
        return []
    names = dict.fromkeys(name for each in found for name in each["psnr"])
    cells = [
        (
            str(read_work(each)),
            *(f"{each['psnr'][name]:.1f} dB" if name in each["psnr"] else "–" for name in names),
        )
        for each in found
    ]
    return folded(f"PSNR to {reference} in all configurations", table(("configuration", *names), cells))


def folded(title: str, lines: Sequence[str]) -> list[str]:
    """Lines for who unfolds them."""
    return ["<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>", ""]


def notes(result: Result) -> list[str]:
    """What seems wrong with the run."""
    return [line for note in result.get("notes", ()) for line in (f"> **Note:** {note}.", "")]


def absent(result: Result) -> list[str]:
    """Who was not measured, and why."""
    lines = [f"- {name}: {reason}" for name, reason in result["absent"].items()]
    return ["## Not measured", "", *lines, ""] if lines else []


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _bytes(value: Any) -> str:
    return "–" if value is None else show_bytes(int(value))
