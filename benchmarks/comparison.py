"""Two results held against each other: which differences are real."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allaprima.benchmarks.arithmetic import Interval, ratio_of_runs
from allaprima.benchmarks.contestants import PEERS
from allaprima.benchmarks.plan import Work
from allaprima.benchmarks.result import Result
from allaprima.benchmarks.summary import rows
from allaprima.bundle import RequestError

Rounds = Mapping[int, float]
"""The median of each round."""
FASTER, SLOWER, SAME, UNKNOWN = "faster", "slower", "no difference", "unknown"


@dataclass(frozen=True)
class Verdict:
    """A contestant in one configuration, or in all that both results have (`work` None).

    `interval` is the ratio of latencies, the second result over the first, or of the latencies over another
    contestant's; None if either has one round only.
    """

    contestant: str
    work: Work | None
    interval: Interval | None
    verdict: str


@dataclass(frozen=True)
class Missing:
    """A contestant's configurations that only one result has; `reason` says why, as far as it was said."""

    contestant: str
    works: tuple[Work, ...]
    reason: str


def missing(before: Result, after: Result) -> tuple[list[Missing], list[Missing]]:
    """What the first has and the second lacks, and the other way round."""
    keys = [list(dict.fromkeys((row.contestant, row.work) for row in rows(each))) for each in (before, after)]
    return _missing(keys[0], keys[1], after), _missing(keys[1], keys[0], before)


def _missing(
    there: Sequence[tuple[str, Work]], others: Sequence[tuple[str, Work]], lacking: Result
) -> list[Missing]:
    only: dict[str, list[Work]] = {}
    for name, work in there:
        if (name, work) not in others:
            only.setdefault(name, []).append(work)
    return [Missing(name, tuple(works), _reason(name, lacking["absent"])) for name, works in only.items()]


def _reason(contestant: str, absent: Mapping[str, str]) -> str:
    """Why it is not there; of a library that nobody could make ready, what was said of "NAME" at all."""
    owners = (peer for peer in PEERS if contestant.startswith(f"{peer}-"))
    owner = max(owners, key=len, default=None)
    asked = (name for name in absent if name.partition(":")[0] == owner)
    return absent.get(contestant) or absent.get(next(asked, ""), "")


def unjudged(before: Result, after: Result, against: str) -> list[str]:
    """What both results have, but without the contestant that it is to be divided by."""
    sides = [dict.fromkeys((row.contestant, row.work) for row in rows(each)) for each in (before, after)]
    return [
        f"{name} at {work}: {against} was not measured in it"
        for name, work in sides[0]
        if (name, work) in sides[1] and not all((against, work) in side for side in sides)
    ]


def compare(
    before: Result,
    after: Result,
    *,
    level: float = 0.95,
    tolerance: float = 0.0,
    against: str | None = None,
) -> list[Verdict]:
    """Verdicts on every configuration that both have, and for each contestant on all together.

    With `against`, a contestant that both have, each latency is first divided by that one's of the same
    round: what made all of a result slower, as a warm day does, is then no difference.

    A difference counts if its whole interval lies beyond 1 ± `tolerance`. A round counts once, with the
    median of its pictures: they share a process, so they are not independent. With many configurations some
    differ by chance, so each interval is widened (Bonferroni) until all of them together hold at `level`.

    Raises RequestError if there is no configuration in common, or not of `against`.
    """
    if not 0 < level < 1 or not 0 <= tolerance < 1:
        raise RequestError(f"level {level}, tolerance {tolerance}: both lie between 0 and 1")
    first, second = (_latencies(each, against) for each in (before, after))
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
            list(first[key].values()),
            list(second[key].values()),
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


def _latencies(result: Result, against: str | None) -> Mapping[tuple[str, Work], Rounds]:
    """The median of every round, over that of `against` if it is given, who is then left out."""
    found = {(row.contestant, row.work): row.by_round() for row in rows(result)}
    if against is None:
        return found
    if not any(name == against for name, _ in found):
        names = ", ".join(dict.fromkeys(name for name, _ in found)) or "nobody"
        raise RequestError(f"against is '{against}', which a result has not measured: it has {names}")
    relative = {
        (name, work): {number: value / base[number] for number, value in rounds.items() if number in base}
        for (name, work), rounds in found.items()
        if name != against and (base := found.get((against, work), {}))
    }
    return {key: rounds for key, rounds in relative.items() if rounds}


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


def _together(rounds: Sequence[Rounds]) -> list[float]:
    """For each round that has all configurations, the geometric mean of their medians."""
    complete = set.intersection(*(set(each) for each in rounds))
    return [statistics.geometric_mean(each[number] for each in rounds) for number in sorted(complete)]


def _words(found: Mapping[tuple[str, Work], Rounds]) -> str:
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
    for name in before["contestants"]:
        if name in after["contestants"]:
            found += _differing(name, *(each["contestants"][name] for each in (before, after)))
    for each, words in ((before, "first"), (after, "second")):
        if not each["complete"]:
            found.append(f"the {words} result is incomplete: {each['stopped'] or 'the run was killed'}")
    found += _differing_versions("", before["versions"], after["versions"])
    return list(dict.fromkeys(found))


def _differing(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Of one contestant: what it computes with."""
    found = [
        f"{name}: {key} {before.get(key)} and {after.get(key)}"
        for key in ("bundle", "precision")
        if before.get(key) != after.get(key)
    ]
    return found + _differing_versions(f"{name}: ", before.get("versions") or {}, after.get("versions") or {})


def _differing_versions(
    begin: str, before: Mapping[str, str | None], after: Mapping[str, str | None]
) -> list[str]:
    """Of libraries that both results speak of: an older one may not know of some."""
    return [
        f"{begin}{name} {before[name]} and {after[name]}"
        for name in sorted(before.keys() & after.keys())
        if before[name] != after[name]
    ]
