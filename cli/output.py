"""What the commands write: tables and JSON to stdout, progress and warnings to stderr."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol


class Report(Protocol):
    """Moves a progress bar."""

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` of a task are done; `note` says what comes now."""


def print_json(value: object) -> None:
    """One JSON document to stdout."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None
) -> None:
    """A table to stdout, as wide as the terminal; without a terminal, as wide as it needs to be."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, show_header=any(columns))
    for row in rows:
        table.add_row(*map(str, row))
    # No markup, no emoji: a prompt may well hold "[red]" or ":cat:".
    terminal = sys.stdout.isatty()
    console = Console(markup=False, emoji=False, highlight=False, width=None if terminal else 10_000)
    console.print(table)


def print_warnings(warnings: Iterable[str]) -> None:
    """One line on stderr for each."""
    for warning in warnings:
        print(f"allaprima: warning: {warning}", file=sys.stderr)


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[Report]:
    """A progress bar on stderr, one line for each task; nothing when quiet or when stderr is no terminal.

    Leaving without an exception completes the bars.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda task, done, total, note="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    words = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (words[0], BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), words[1])
    with Progress(*columns, console=Console(stderr=True)) as bar:
        lines: dict[str, TaskID] = {}

        def report(task: str, done: int, total: int, note: str = "") -> None:
            if task not in lines:
                lines[task] = bar.add_task(task, total=total, note=note)
            bar.update(lines[task], completed=done, total=total, note=note)

        yield report
        for task in bar.tasks:
            bar.update(task.id, completed=task.total, note="")


def show_bytes(count: int) -> str:
    """A number of bytes for a reader: "512 B", "15.3 MB" (decimal units)."""
    if count < 1000:
        return f"{count} B"
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.1f} {' kMGT'[power]}B"


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option --json."""
    parser.add_argument("--json", action="store_true", help="write JSON to stdout")


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """The option --quiet."""
    parser.add_argument("-q", "--quiet", action="store_true", help="write nothing but errors")


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of "768x512"; argparse's error for anything else."""
    width, separator, height = text.lower().partition("x")
    if not (separator and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size: write WIDTHxHEIGHT in pixels, as 768x512")
    return int(width), int(height)
