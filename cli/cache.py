"""`allaprima cache`: the engines that were compiled for this machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from allaprima.bundle import cache_folder
from allaprima.cli.output import add_json, print_json, print_table, show_bytes

if TYPE_CHECKING:
    from allaprima.engine import Entry


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = (
        f"The cache is {cache_folder()}; the environment variable ALLAPRIMA_CACHE names another."
    )
    parser.add_argument(
        "action",
        metavar="list|prune|clear",
        choices=("list", "prune", "clear"),
        help="list the engines, remove those that will never be loaded again, or remove all",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """List or remove, and show what is there or what went."""
    from allaprima.engine import clear, entries, prune

    found = {"list": entries, "prune": prune, "clear": clear}[options.action]()
    if options.json:
        print_json([_to_json(entry) for entry in found])
        return
    if found:
        print_table(
            ("bundle", "component", "backend", "precision", "size", "state", "name"), map(_row, found)
        )
    size = show_bytes(sum(entry.size for entry in found))
    what = "holds" if options.action == "list" else "lost"
    count = sum(entry.engine is not None or entry.path.is_dir() for entry in found)
    print(f"{cache_folder()} {what} {count} engines, {size}")


def _row(entry: Entry) -> tuple[str, ...]:
    state = entry.stale or "ready"
    if entry.engine is None:
        kind = "" if entry.path.is_dir() else "timings"
        return "", kind, "", "", show_bytes(entry.size), state, entry.path.name
    key = entry.engine.key
    size = show_bytes(entry.size)
    return entry.engine.bundle, key.component, key.backend, key.precision, size, state, entry.path.name


def _to_json(entry: Entry) -> dict[str, Any]:
    engine = None if entry.engine is None else entry.engine.to_json()
    return {"path": str(entry.path), "size": entry.size, "stale": entry.stale, "engine": engine}
