"""Two results held against each other."""

import copy

import pytest

from allaprima.benchmarks import comparison
from allaprima.benchmarks.comparison import (
    FASTER,
    SAME,
    SLOWER,
    UNKNOWN,
    Verdict,
    compare,
    differences,
    missing,
    unjudged,
)
from allaprima.benchmarks.result import Result
from allaprima.bundle import RequestError


def scaled(result: Result, factor: float, *, name: str = "quick", only: int | None = None) -> Result:
    """The same result with other latencies of one contestant, in all step counts or one."""
    other = copy.deepcopy(result)
    for turn in other["contestants"][name]["turns"]:
        for entry in turn["pictures"]:
            if only in (None, entry["steps"]):
                entry["seconds"] = [value * factor for value in entry["seconds"]]
    return other


def by_name(verdicts: list[Verdict]) -> dict[tuple[str, int | None], str]:
    return {(each.contestant, each.work.steps if each.work else None): each.verdict for each in verdicts}


@pytest.mark.parametrize(("factor", "wanted"), [(1.5, SLOWER), (0.5, FASTER), (1.005, SAME)])
def test_verdicts(result: Result, factor: float, wanted: str) -> None:
    verdicts = compare(result, scaled(result, factor))
    assert by_name(verdicts) == {
        **{("quick", steps): wanted for steps in (1, 4, 8, None)},
        **{("slow", steps): SAME for steps in (1, 4, 8, None)},
    }
    changed = next(each.interval for each in verdicts if each.contestant == "quick")
    assert changed is not None
    assert changed.ratio == pytest.approx(factor)
    assert changed.low < factor < changed.high


def test_one_configuration_alone(result: Result) -> None:
    found = by_name(compare(result, scaled(result, 1.3, only=8)))
    assert found["quick", 8] == SLOWER
    assert found["quick", 1] == SAME


def test_what_does_not_matter_is_tolerated(result: Result) -> None:
    slower = scaled(result, 1.2)
    assert SLOWER in by_name(compare(result, slower)).values()
    assert set(by_name(compare(result, slower, tolerance=0.3)).values()) == {SAME}
    assert set(by_name(compare(result, slower, level=0.9999999)).values()) == {SAME}


def test_one_round_is_no_evidence(result: Result) -> None:
    short = scaled(result, 2.0)
    for each in short["contestants"].values():
        del each["turns"][1:]
    assert set(by_name(compare(result, short)).values()) == {UNKNOWN}


def test_only_what_both_have_is_compared(result: Result) -> None:
    other = copy.deepcopy(result)
    del other["contestants"]["slow"]
    for turn in other["contestants"]["quick"]["turns"]:
        turn["pictures"] = turn["pictures"][:1]
    assert by_name(compare(result, other)) == {("quick", 1): SAME, ("quick", None): SAME}


def test_what_only_one_result_has_is_listed(result: Result) -> None:
    other = copy.deepcopy(result)
    other["contestants"]["slow"]["turns"] = []
    other["absent"]["slow"] = "RuntimeError: it crashed"
    for turn in other["contestants"]["quick"]["turns"]:
        turn["pictures"] = turn["pictures"][:2]
    lost, gained = missing(result, other)
    assert [(each.contestant, [work.steps for work in each.works], each.reason) for each in lost] == [
        ("quick", [8], ""),
        ("slow", [1, 4, 8], "RuntimeError: it crashed"),
    ]
    assert gained == []
    assert missing(other, result) == ([], lost)
    assert missing(result, result) == ([], [])
    other["absent"] = {"slo": "another", "slow:bf16": "another", "nobody": "another"}
    assert missing(result, other)[0][1].reason == ""


def test_why_a_library_was_not_there_at_all(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reason stands under the name that was asked for, its contestants have a precision in theirs."""
    monkeypatch.setattr(comparison, "PEERS", ("pee", "peer"))
    other = copy.deepcopy(result)
    result["contestants"]["peer-bf16"] = result["contestants"].pop("slow")
    del other["contestants"]["slow"]
    for name in ("peer", "peer:bf16"):
        other["absent"] = {name: "it is not installed", "pee": "another", "peer-bf": "another"}
        assert [each.reason for each in missing(result, other)[0]] == ["it is not installed"]


def test_a_slower_day_is_cancelled_by_another_contestant(result: Result) -> None:
    """All of it 1.5 times slower, and `quick` 1.2 times more."""
    day = scaled(scaled(result, 1.5 * 1.2), 1.5, name="slow")
    assert set(by_name(compare(result, day)).values()) == {SLOWER}
    found = compare(result, day, against="slow")
    assert by_name(found) == {("quick", steps): SLOWER for steps in (1, 4, 8, None)}
    assert all(each.interval is not None for each in found)
    assert [each.interval.ratio for each in found if each.interval] == pytest.approx([1.2] * 4)
    same = scaled(scaled(result, 1.5), 1.5, name="slow")
    assert set(by_name(compare(result, same, against="slow")).values()) == {SAME}


def test_only_rounds_of_both_contestants_are_paired(result: Result) -> None:
    other = copy.deepcopy(result)
    del other["contestants"]["slow"]["turns"][1:]
    assert set(by_name(compare(result, other, against="slow")).values()) == {UNKNOWN}


def test_against_somebody_who_was_not_measured(result: Result) -> None:
    other = copy.deepcopy(result)
    other["contestants"]["slow"]["turns"] = []
    with pytest.raises(RequestError, match=r"against is 'nobody'.*: it has quick, slow"):
        compare(result, result, against="nobody")
    with pytest.raises(RequestError, match=r"against is 'slow'.*: it has quick"):
        compare(result, other, against="slow")
    with pytest.raises(RequestError, match="no configuration in common"):
        compare(other, other, against="quick")


def test_what_cannot_be_divided_is_told(result: Result) -> None:
    other = copy.deepcopy(result)
    for turn in other["contestants"]["slow"]["turns"]:
        turn["pictures"] = turn["pictures"][:2]
    assert unjudged(result, result, "slow") == []
    (told,) = unjudged(result, other, "slow")
    assert told.startswith("quick at 8 steps")
    assert told.endswith(": slow was not measured in it")


def test_nothing_in_common(result: Result) -> None:
    other = copy.deepcopy(result)
    other["contestants"] = {"another": other["contestants"]["quick"]}
    with pytest.raises(
        RequestError, match=r"no configuration in common: .*quick, slow at 1 step.*another at"
    ):
        compare(result, other)


@pytest.mark.parametrize(("level", "tolerance"), [(1.0, 0.0), (0.0, 0.0), (0.95, -0.1), (0.95, 1.0)])
def test_levels(result: Result, level: float, tolerance: float) -> None:
    with pytest.raises(RequestError, match="between 0 and 1"):
        compare(result, result, level=level, tolerance=tolerance)


def test_what_else_differs_is_said(result: Result) -> None:
    assert differences(result, copy.deepcopy(result)) == []
    other = copy.deepcopy(result)
    other["threads"] += 1
    other["machine"]["cpu"] = "another"
    other["plan"]["settings"]["sampler"] = "euler"
    other["contestants"]["quick"] |= {"bundle": "other", "precision": "bf16"}
    result["contestants"]["slow"]["versions"] = {"torch": "2.12", "python": "3.11"}
    other["contestants"]["slow"]["versions"] = {"torch": "2.13", "python": "3.11"}
    other["complete"], other["stopped"] = False, "it was interrupted"
    words = "\n".join(differences(result, other))
    for part in (
        "threads 1 and 2",
        "cpu",
        "sampler ddim and euler",
        "quick: bundle tiny and other",
        "quick: precision fp32 and bf16",
        "slow: torch 2.12 and 2.13",
        "the second result is incomplete: it was",
    ):
        assert part in words
