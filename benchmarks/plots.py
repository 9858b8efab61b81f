"""Pictures of a result, as small SVG files: one for light pages and one for dark ones.

The same result always gives the same bytes: no date, no random names. Text stays text, in the reader's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from allaprima.benchmarks.plan import side_by_side
from allaprima.benchmarks.result import Result, read_work
from allaprima.benchmarks.roofline import Point, ceiling, points
from allaprima.benchmarks.summary import STAGES, Fit, fits, rows
from allaprima.bundle import RequestError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Theme:
    """Colours of a page: its text and its lines; the background stays clear."""

    name: str
    text: str
    lines: str


LIGHT, DARK = Theme("light", "#1f2328", "#d1d9e0"), Theme("dark", "#e6edf3", "#3d444d")
# Okabe and Ito's colours, which readers of any colour vision tell apart; but for black and yellow, since
# pages are white or black.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999", "#8c6bb1")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH = 7.2
"""Of a plot, in inches of 72 points."""


def plot_all(result: Result, folder: Path) -> list[tuple[str, str]]:
    """Write every plot that the result has figures for; name and title of each, in the order of the report.

    Raises RequestError if matplotlib is not installed.
    """
    check_plots()
    written = []
    for name, title, prepare in PLOTS:
        draw = prepare(result)
        if draw is None:
            continue
        write_plot(draw, folder, name)
        written.append((name, title))
    return written


def check_plots() -> None:
    """Raise RequestError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RequestError(f"plots need matplotlib ({error}): pip install 'allaprima[bench]'") from error


@dataclass(frozen=True)
class Draw:
    """What draws a plot into axes, and its height in inches."""

    height: float
    into: Callable[[Axes, Theme], None]


def write_plot(draw: Draw, folder: Path, name: str) -> None:
    """Write a plot to NAME.svg and NAME-dark.svg."""
    for theme in (LIGHT, DARK):
        suffix = "" if theme is LIGHT else "-dark"
        (folder / f"{name}{suffix}.svg").write_text(_render(draw, theme), encoding="utf-8")


def embed(name: str, title: str) -> list[str]:
    """The lines that show a written plot on GitHub, in the colours of the reader's page."""
    return [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{name}-dark.svg">',
        f'  <img alt="{title}" src="{name}.svg">',
        "</picture>",
    ]


def _render(draw: Draw, theme: Theme) -> str:
    """The SVG of a plot."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    fonts = ["Helvetica", "Arial", "DejaVu Sans", "sans-serif"]
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "allaprima",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.text),
        "axes.edgecolor": theme.lines,
        "grid.color": theme.lines,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, draw.height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(True, linewidth=0.6)
        draw.into(axes, theme)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    named = re.sub(r"'DejaVu Sans'(, sans-serif)?", ", ".join(fonts), out.getvalue())
    return re.sub(r"\n\s*", "\n", named)  # indentation is a tenth of the file


class Look(NamedTuple):
    """How a contestant is drawn: its colour, its mark, and its line as matplotlib names it."""

    colour: str
    mark: str
    line: str


def looks_of(result: Result) -> Mapping[str, Look]:
    """How each contestant is drawn, all of them differently: colours that come again have other marks."""
    looks = {}
    for index, name in enumerate(result["contestants"]):
        again, place = divmod(index, len(COLOURS))
        mark = MARKS[(place + again) % len(MARKS)]
        looks[name] = Look(COLOURS[place], mark, ("-", "--", ":", "-.")[again % 4])
    return looks


def latency(result: Result) -> Draw | None:
    """Latency against steps, at the smallest batch and the largest size."""
    found = rows(result)
    if len({row.work.steps for row in found}) < 2:
        return None
    shape = side_by_side(row.work for row in found).shape
    looks, lines = looks_of(result), {fit.contestant: fit for fit in fits(found) if _shape(fit) == shape}

    def draw(axes: Axes, theme: Theme) -> None:
        for name, (colour, mark, dash) in looks.items():
            mine = [row for row in found if row.contestant == name and row.work.shape == shape]
            if not mine:
                continue
            steps = [row.work.steps for row in mine]
            middle = [row.median for row in mine]
            spread = [
                [row.median - row.at(10) for row in mine],
                [row.at(90) - row.median for row in mine],
            ]
            axes.errorbar(
                steps,
                middle,
                [[max(0.0, each) for each in side] for side in spread],
                fmt=mark,
                ms=4.5,
                color=colour,
                lw=1,
                label=name,
            )
            if name in lines:
                line = lines[name].line
                ends = [min(steps), max(steps)]
                heights = [line.fixed + line.per_step * each for each in ends]
                axes.plot(ends, heights, dash, color=colour, lw=1.2)
        counts = sorted({row.work.steps for row in found})
        axes.set_xticks(counts, [str(each) for each in counts])
        axes.set_xlabel(f"denoising steps (batch {shape[0]}, {shape[1]}x{shape[2]})")
        axes.set_ylabel("seconds")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        _legend(axes)

    return Draw(3.6, draw)


def throughput(result: Result) -> Draw | None:
    """Pictures a second against the batch."""
    found = rows(result)
    if len({row.work.batch for row in found}) < 2:
        return None
    shown = side_by_side(row.work for row in found)
    looks = looks_of(result)

    def draw(axes: Axes, theme: Theme) -> None:
        for name, (colour, mark, dash) in looks.items():
            mine = [
                (row.work.batch, row.rate)
                for row in found
                if row.contestant == name and replace(row.work, batch=shown.batch) == shown
            ]
            if mine:
                axes.plot(
                    *zip(*sorted(mine), strict=True), mark + dash, ms=4.5, lw=1.2, color=colour, label=name
                )
        axes.set_xscale("log", base=2)
        batches = sorted({row.work.batch for row in found})
        axes.set_xticks(batches, [str(each) for each in batches])
        axes.minorticks_off()
        axes.set_xlabel(f"pictures in a batch ({shown.steps} steps, {shown.width}x{shown.height})")
        axes.set_ylabel("pictures a second")
        axes.set_ylim(bottom=0)
        _legend(axes)

    return Draw(3.4, draw)


def stages(result: Result) -> Draw | None:
    """Where the time of one configuration goes, one bar for each contestant that knows it."""
    found = rows(result)
    found = [row for row in found if "denoise" in row.stages]
    if not found:
        return None
    work = side_by_side(row.work for row in found)
    mine = [row for row in found if row.work == work][::-1]

    def draw(axes: Axes, theme: Theme) -> None:
        names = [row.contestant for row in mine]
        shown = [
            stage for stage in STAGES if stage != "transfer" and any(stage in row.stages for row in mine)
        ]
        left = [0.0] * len(mine)
        for index, stage in enumerate(shown):
            widths = [row.stages.get(stage, 0.0) for row in mine]
            axes.barh(names, widths, 0.6, left, color=COLOURS[index], label=stage)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        rest = [
            max(0.0, row.median - sum(row.stages.get(stage, 0.0) for stage in shown if stage != "png"))
            for row in mine
        ]
        axes.barh(names, rest, 0.6, left, color="#999999", label="other")
        axes.set_xlabel(f"seconds ({work})")
        axes.grid(False, axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6)

    return Draw(1.2 + 0.34 * len(mine), draw)


def roofline(result: Result) -> Draw | None:
    """Operations a second against operations a byte, under what the machine can do."""
    found = points(result)
    if not found:
        return None
    # One shape: the same graph at another one lies so near that the names could not be read.
    shape = side_by_side(point.work for point in found).shape
    found = [point for point in found if point.work.shape == shape]
    looks = looks_of(result)

    def draw(axes: Axes, theme: Theme) -> None:
        marks = dict(zip(dict.fromkeys(point.component for point in found), MARKS, strict=False))
        span = _span(found)
        for name, (colour, _, dash) in looks.items():
            mine = [point for point in found if point.contestant == name]
            limits = ceiling(result, name)
            if not mine or limits is None:
                continue
            axes.plot(
                span,
                [min(limits[0], each * limits[1]) / 1e9 for each in span],
                dash,
                color=colour,
                lw=1.2,
                label=name,
            )
            for point in mine:
                axes.plot(
                    point.intensity, point.rate / 1e9, marks[point.component], ms=6, color=colour, mew=0
                )
        for component, mark in marks.items():
            axes.plot([], [], mark, color=theme.text, ms=5, label=component)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_minor_formatter("")  # they would overlap
        axes.set_xlabel("operations a byte")
        axes.set_ylabel("billion operations a second")
        _legend(axes)

    return Draw(3.8, draw)


def _span(found: Sequence[Point]) -> list[float]:
    """Where the lines are drawn: from left of all points to right of all."""
    low, high = (pick(point.intensity for point in found) for pick in (min, max))
    low, high = low / 4, high * 4
    return [low * (high / low) ** (index / 60) for index in range(61)]


def quality(result: Result) -> Draw | None:
    """PSNR against pictures a second."""
    decibels = result["quality"].get("psnr", {})
    found = rows(result)
    if not decibels or not found:
        return None
    work = read_work(result["quality"])
    looks = looks_of(result)

    def draw(axes: Axes, theme: Theme) -> None:
        for row in found:
            if row.work == work and row.contestant in decibels:
                colour, mark, _ = looks[row.contestant]
                axes.plot(row.rate, decibels[row.contestant], mark, ms=7, color=colour, label=row.contestant)
        axes.set_xlabel(f"pictures a second ({work})")
        axes.set_ylabel(f"PSNR to {result['quality']['reference']}, dB")
        axes.margins(0.12)
        _legend(axes)

    return Draw(3.2, draw)


def _shape(fit: Fit) -> tuple[int, int, int]:
    return fit.batch, fit.width, fit.height


def _legend(axes: Any) -> None:
    """Beside the plot, where it hides nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)


PLOTS: Sequence[tuple[str, str, Callable[[Result], Draw | None]]] = (
    ("latency", "Latency against steps", latency),
    ("throughput", "Throughput against batch", throughput),
    ("stages", "Where the time goes", stages),
    ("roofline", "Roofline", roofline),
    ("quality", "Quality against speed", quality),
)
"""File name, title, and what prepares the plot; None where a result has no figures for it."""
