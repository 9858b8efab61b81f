"""From a result's raw measurements to the figures that are shown."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allaprima.benchmarks.arithmetic import Interval, Line, fit_line, percentile, ratio_of_pairs
from allaprima.benchmarks.plan import Work
from allaprima.benchmarks.result import Result, measurements

STAGES = ("text", "denoise", "decode", "transfer", "png")
"""In the order of time; transfers lie within the others, and PNG comes after what is counted as latency."""


@dataclass(frozen=True)
class Row:
    """One contestant in one configuration: all in seconds, for the whole batch.

    `rounds` holds what each round measured. `stages` are medians. `overhead` is the median share of the
    latency that is neither engine nor transfer, None where it is not known.
    """

    contestant: str
    work: Work
    rounds: Mapping[int, tuple[float, ...]]
    stages: Mapping[str, float]
    overhead: float | None

    @property
    def seconds(self) -> list[float]:
        """All latencies."""
        return [value for values in self.rounds.values() for value in values]

    @property
    def median(self) -> float:
        """Of all latencies."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Pictures in a second, from the median."""
        return self.work.batch / self.median

    def at(self, percent: float) -> float:
        """A percentile of the latencies."""
        return percentile(self.seconds, percent)

    def by_round(self) -> dict[int, float]:
        """The median of each round."""
        return {number: statistics.median(values) for number, values in self.rounds.items()}


@dataclass(frozen=True)
class Fit:
    """How the latency of a contestant grows with the steps, for one batch and size."""

    contestant: str
    batch: int
    width: int
    height: int
    line: Line


@dataclass(frozen=True)
class Costs:
    """What a contestant takes apart from painting: seconds as medians over its turns, the most bytes of any.

    `warm_up` is the first picture of every shape together.
    """

    contestant: str
    load: float | None
    warm_up: float | None
    memory: int | None
    device_memory: int | None


def rows(result: Result) -> list[Row]:
    """All that was measured, contestants in their order and configurations in theirs."""
    found: dict[tuple[str, Work], list[tuple[int, Mapping[str, Any]]]] = defaultdict(list)
    for name, turn, work, entry in measurements(result):
        found[name, work].append((turn["round"], entry))
    return [_row(name, work, entries) for (name, work), entries in found.items()]


def _row(name: str, work: Work, entries: Sequence[tuple[int, Mapping[str, Any]]]) -> Row:
    stages: defaultdict[str, list[float]] = defaultdict(list)
    shares: list[float] = []
    for _, entry in entries:
        for stage, values in (*entry["stages"].items(), ("png", entry["png"])):
            stages[stage] += values
        if entry["engine"] is not None:
            parts = [each["seconds"] for each in entry["engine"].values()]
            parts += [entry["stages"]["transfer"]] if "transfer" in entry["stages"] else []
            shares += [1 - sum(found) / whole for whole, *found in zip(entry["seconds"], *parts, strict=True)]
    return Row(
        name,
        work,
        {number: tuple(entry["seconds"]) for number, entry in entries},
        {stage: statistics.median(stages[stage]) for stage in STAGES if stage in stages},
        statistics.median(shares) if shares else None,
    )


def fits(found: Sequence[Row]) -> list[Fit]:
    """A line for each contestant, batch and size with several step counts, through their medians."""
    groups: dict[tuple[str, int, int, int], list[Row]] = {}
    for row in found:
        groups.setdefault((row.contestant, *row.work.shape), []).append(row)
    lines = {
        key: fit_line([row.work.steps for row in group], [row.median for row in group])
        for key, group in groups.items()
    }
    return [Fit(*key, line) for key, line in lines.items() if line is not None]


def costs(result: Result) -> list[Costs]:
    """Of every contestant that had a turn."""
    return [
        Costs(
            name,
            _middle([turn["load"] for turn in each["turns"]]),
            _middle([sum(warm) if (warm := turn.get("warm_up")) else None for turn in each["turns"]]),
            _largest([turn["memory"] for turn in each["turns"]]),
            _largest([turn["device_memory"] for turn in each["turns"]]),
        )
        for name, each in result["contestants"].items()
        if each["turns"]
    ]


def against(found: Sequence[Row], first: str) -> dict[tuple[str, Work], Interval]:
    """How many times longer each takes than the contestant `first` in the same configuration and round.

    Of a single round the interval's ends are not numbers.
    """
    base = {row.work: row.by_round() for row in found if row.contestant == first}
    ratios: dict[tuple[str, Work], Interval] = {}
    for row in found:
        mine, theirs = row.by_round(), base.get(row.work, {})
        shared = sorted(mine.keys() & theirs.keys())
        if row.contestant != first and shared:
            pairs = [theirs[number] for number in shared], [mine[number] for number in shared]
            single = Interval(pairs[1][0] / pairs[0][0], math.nan, math.nan)
            ratios[row.contestant, row.work] = ratio_of_pairs(*pairs) or single
    return ratios


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _largest(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
