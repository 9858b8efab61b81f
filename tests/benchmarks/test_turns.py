"""Turns in real processes of their own."""

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from allaprima.benchmarks.contestants import Contestant
from allaprima.benchmarks.plan import Plan
from allaprima.benchmarks.process import peak_memory
from allaprima.benchmarks.turns import KILLED, Turn, prepare, run_turn


def test_a_turn_warms_up_and_says_everything_at_once(made_up: ModuleType, plan: Plan, tmp_path: Path) -> None:
    log = tmp_path / "log"
    contestant = Contestant("a", "fp32", functools.partial(made_up.steady, 9, log))
    seen = []
    turn: Turn | None = None
    for turn in run_turn(contestant, plan, 1, cache=tmp_path / "cache", keep=tmp_path):
        seen.append((len(turn.pictures), turn.complete))
    assert turn is not None
    assert seen == [(0, False), *[(count, False) for count in range(1, 9)], (8, False), (8, True)]
    one, two = ["9 1 1 16", "9 5 1 16"] * 2, ["9 1 2 16", "9 5 2 16"] * 2
    assert log.read_text().splitlines() == ["9 2 1 16", *one, "9 2 2 16", *two]
    assert turn.round == 1
    assert Counter(picture.work for picture in turn.pictures) == dict.fromkeys(plan.works, 2)
    assert all(picture.seconds > 0 and picture.png > 0 for picture in turn.pictures)
    assert turn.pictures[-1].engine == {"denoiser": (0.0, 5)}
    assert turn.load is not None
    assert turn.memory is not None
    assert turn.memory > 10**7
    assert turn.device_memory is None, "it is on no device"
    assert len(turn.warm_up) == 2, "one for each shape"
    assert all(seconds > 0 for seconds in turn.warm_up)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"{work.steps}-{work.batch}-16x8.png" for work in plan.works
    }


def test_one_that_is_killed_leaves_what_it_measured(made_up: ModuleType, plan: Plan, tmp_path: Path) -> None:
    contestant = Contestant("a", "fp32", functools.partial(made_up.dying, 9, tmp_path / "log"))
    seen: list[Turn] = []
    with pytest.raises(RuntimeError, match=KILLED):
        seen.extend(run_turn(contestant, replace(plan, repeats=3), 0, cache=None, keep=tmp_path))
    assert len(seen[-1].pictures) == 1
    assert not seen[-1].complete


def test_one_that_is_missing_says_why(made_up: ModuleType, plan: Plan, tmp_path: Path) -> None:
    contestant = Contestant("a", "fp32", made_up.broken)
    with pytest.raises(RuntimeError, match="ModuleNotFoundError: no module named 'peer'"):
        list(run_turn(contestant, plan, 0, cache=None, keep=tmp_path))


def test_engines_are_built_and_files_read_before(made_up: ModuleType, plan: Plan, tmp_path: Path) -> None:
    log = tmp_path / "log"
    contestant = Contestant(
        "a",
        "fp32",
        functools.partial(made_up.told, 9, log),
        build=functools.partial(made_up.build, 9, log),
    )
    prepare(contestant, plan.settings, plan.works, None, load=True)
    assert log.read_text().splitlines() == ["9 build [1, 1, 2, 2]", "9 open [1, 1, 2, 2]"]
    prepare(contestant, plan.settings, plan.works[:1], None)
    assert log.read_text().splitlines()[2:] == ["9 build [1]"]
    with pytest.raises(RuntimeError, match="ValueError: it cannot be built"):
        prepare(replace(contestant, build=made_up.no_engine), plan.settings, plan.works, None)
    prepare(replace(contestant, build=None), plan.settings, plan.works, None)
    assert len(log.read_text().splitlines()) == 3, "nothing was to be made ready"


def test_peak_memory_is_in_bytes() -> None:
    assert 10**7 < peak_memory() < 10**12
