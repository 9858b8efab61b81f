"""`allaprima bench compare`: which differences between two results are real."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from allaprima.bundle import RequestError
from allaprima.cli.output import print_json, print_table, print_warnings

if TYPE_CHECKING:
    from allaprima.benchmarks.comparison import Missing, Verdict

COMPARE, _IS_WORSE = "compare", 1
"""The word that asks for it, and the exit code if the second is slower, or lacks what the first has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `allaprima bench compare`."""
    group = parser.add_argument_group("of compare")
    add = group.add_argument
    add(
        "--level",
        metavar="X",
        type=float,
        default=0.95,
        help="of confidence, in all verdicts together (0.95)",
    )
    add(
        "--tolerance",
        metavar="X",
        type=float,
        default=0.0,
        help="differences that do not matter, as 0.02 (0)",
    )
    add(
        "--against",
        metavar="CONTESTANT",
        help="compare the latencies over this one's, which both results have: cancels a slower day",
    )


def run(options: argparse.Namespace) -> int | None:
    """Compare; exit code 1 if the second is slower, or lacks what the first has."""
    from allaprima.benchmarks.comparison import SLOWER, compare, differences, missing, unjudged
    from allaprima.benchmarks.result import read

    if len(options.words) != 3:
        raise RequestError(f"compare takes two results, not {len(options.words) - 1}: their files or folders")
    before, after = (read(Path(word)) for word in options.words[1:])
    against = options.against
    verdicts = compare(before, after, level=options.level, tolerance=options.tolerance, against=against)
    notes, (lost, gained) = differences(before, after), missing(before, after)
    left_out = [] if against is None else unjudged(before, after, against)
    if options.json:
        print_json(
            {
                "verdicts": [_verdict_to_json(each) for each in verdicts],
                "differences": notes,
                "unjudged": left_out,
                "missing": {
                    "second": [asdict(each) for each in lost],
                    "first": [asdict(each) for each in gained],
                },
            }
        )
    elif not options.quiet:
        print_warnings(f"the results differ in {note}" for note in notes)
        print_warnings(f"not compared: {each}" for each in left_out)
        for number, found in (("second", lost), ("first", gained)):
            print_warnings(f"the {number} result lacks {_words(each)}" for each in found)
        ratio = "latency, ratio" if against is None else f"latency over {against}, ratio"
        print_table(("contestant", "configuration", ratio, "interval", "verdict"), map(_row, verdicts))
    return _IS_WORSE if lost or any(each.verdict == SLOWER for each in verdicts) else None


def _words(missing: Missing) -> str:
    shown = _listed([str(work) for work in missing.works])
    return f"{missing.contestant} at {shown}" + (f": {missing.reason}" if missing.reason else "")


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return "; ".join(words[:3]) + more


def _row(verdict: Verdict) -> tuple[str, ...]:
    interval = verdict.interval
    shown = (
        ("–", "needs 2 rounds of each")
        if interval is None
        else (
            f"{interval.ratio:.3f}",
            f"{interval.low:.3f} – {interval.high:.3f}",
        )
    )
    return verdict.contestant, str(verdict.work or "all together"), *shown, verdict.verdict


def _verdict_to_json(verdict: Verdict) -> dict[str, object]:
    work, interval = verdict.work, verdict.interval
    return {
        "contestant": verdict.contestant,
        "configuration": None if work is None else asdict(work),
        "interval": None if interval is None else asdict(interval),
        "verdict": verdict.verdict,
    }
