"""Two results held against each other: which differences are real."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from allaprima.benchmarks.arithmetic import Interval, ratio_of_runs
from allaprima.benchmarks.plan import Work
from allaprima.benchmarks.result import Result
from allaprima.benchmarks.summary import Row, rows
from allaprima.bundle import RequestError

FASTER, SLOWER, SAME, UNKNOWN = "faster", "slower", "no difference", "unknown"


@dataclass(frozen=True)
class Verdict:
    """A contestant in one configuration, or in all that both results have (`work` None).

    `interval` is the ratio of latencies, the second result over the first; None if either has one round only.
    """

    contestant: str
    work: Work | None
    interval: Interval | None
    verdict: str


def compare(before: Result, after: Result, *, level: float = 0.95, tolerance: float = 0.0) -> list[Verdict]:
    """Verdicts on every configuration that both have, and for each contestant on all together.

    A difference counts if its whole interval lies beyond 1 ± `tolerance`. A round counts once, with the
    median of its pictures: they share a process, so they are not independent. With many configurations some
    differ by chance, so each interval is widened (Bonferroni) until all of them together hold at `level`.

    Raises RequestError if there is no configuration in common.
    """
    if not 0 < level < 1 or not 0 <= tolerance < 1:
        raise RequestError(f"level {level}, tolerance {tolerance}: both lie between 0 and 1")
    first, second = ({(row.contestant, row.work): row for row in rows(each)} for each in (before, after))
    shared = [key for key in first if key in second]
    if not shared:
        raise RequestError(
            f"the results have no configuration in common: the first has {_words(first)}; "
            f"the second has {_words(second)}"
        )
    names = list(dict.fromkeys(name for name, _ in shared))
    each = 1 - (1 - level) / (len(shared) + len(names))
    verdicts = [
        _judge(
            *key,
            list(first[key].by_round().values()),
            list(second[key].by_round().values()),
            each,
            tolerance,
        )
        for key in shared
    ]
    for name in names:
        works = [work for found, work in shared if found == name]
        overall = [_together([side[name, work] for work in works]) for side in (first, second)]
        verdicts.append(_judge(name, None, overall[0], overall[1], each, tolerance))
    return verdicts


def _judge(
    name: str,
    work: Work | None,
    before: Sequence[float],
    after: Sequence[float],
    level: float,
    tolerance: float,
) -> Verdict:
    interval = ratio_of_runs(before, after, level)
    if interval is None:
        verdict = UNKNOWN
    elif interval.low > 1 + tolerance:
        verdict = SLOWER
    elif interval.high < 1 - tolerance:
        verdict = FASTER
    else:
        verdict = SAME
    return Verdict(name, work, interval, verdict)


def _together(found: Sequence[Row]) -> list[float]:
    """For each round that has all configurations, the geometric mean of their medians."""
    rounds = [row.by_round() for row in found]
    complete = set.intersection(*(set(each) for each in rounds))
    return [statistics.geometric_mean(each[number] for each in rounds) for number in sorted(complete)]


def _words(found: dict[tuple[str, Work], Row]) -> str:
    names = sorted({name for name, _ in found})
    works = sorted({work for _, work in found})
    if not works:
        return "none"
    more = f" and {len(works) - 3} more" if len(works) > 3 else ""
    return f"{', '.join(names)} at {'; '.join(map(str, works[:3]))}{more}"


def differences(before: Result, after: Result) -> list[str]:
    """What else differs between the two, in words: a ratio may be due to any of it."""
    found = []
    for name in ("cpu", "cores", "gpus"):
        one, two = before["machine"].get(name), after["machine"].get(name)
        if one != two:
            found.append(f"machine: {name} {one} and {two}")
    for name in ("threads", "model"):
        if before[name] != after[name]:
            found.append(f"{name} {before[name]} and {after[name]}")
    one, two = (each["plan"]["settings"] for each in (before, after))
    found += [f"{name} {one[name]} and {two[name]}" for name in one if name in two and one[name] != two[name]]
    for each, words in ((before, "first"), (after, "second")):
        if not each["complete"]:
            found.append(f"the {words} result is incomplete: {each['stopped'] or 'the run was killed'}")
    versions = before["versions"].keys() & after["versions"].keys()
    found += [
        f"{name} {before['versions'][name]} and {after['versions'][name]}"
        for name in sorted(versions)
        if before["versions"][name] != after["versions"][name]
    ]
    return list(dict.fromkeys(found))
