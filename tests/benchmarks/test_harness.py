"""A whole benchmark with contestants that only pretend to paint, in this process."""

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from allaprima.benchmarks import harness, turns
from allaprima.benchmarks.contestants import Contestant
from allaprima.benchmarks.harness import Harness, Measured
from allaprima.benchmarks.page import write_report
from allaprima.benchmarks.plan import Plan, Work
from allaprima.benchmarks.result import new_result
from allaprima.benchmarks.scenarios import Traffic
from allaprima.benchmarks.turns import Job, Message


def here(job: Job) -> Iterator[Message]:
    """As turns.listen, without a process."""
    said: list[Message] = []
    try:
        job(said.append)
    except Exception as error:
        yield from said
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    yield from said


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "listen", here)
    monkeypatch.setattr(harness, "listen", here)


def steady(made_up: ModuleType, name: str, colour: int, log: Path, **others: Any) -> Contestant:
    return Contestant(name, "fp32", functools.partial(made_up.steady, colour, log), **others)


def test_contestants_take_turns(made_up: ModuleType, plan: Plan, tmp_path: Path) -> None:
    log = tmp_path / "log"
    contestants = [steady(made_up, "a", 1, log), steady(made_up, "b", 2, log)]
    result, kept = new_result("bench", "tiny", plan), list[str]()
    Harness(result, contestants, plan, keep=lambda: kept.append(json.dumps(result))).run(
        Measured(cold=0, roofline=False)
    )
    order = [line.split()[0] for line in log.read_text().splitlines()]
    turn = len(order) // 4
    assert "".join(order) == "1" * turn + "2" * turn + "1" * turn + "2" * turn
    assert result["complete"]
    for each in result["contestants"].values():
        assert [turn["round"] for turn in each["turns"]] == [0, 1]
        assert all(turn["complete"] and len(turn["pictures"]) == 4 for turn in each["turns"])
        assert all(len(entry["seconds"]) == 2 for turn in each["turns"] for entry in turn["pictures"])
    assert json.loads(kept[-1])["complete"]
    assert not any(json.loads(text)["complete"] for text in kept[:-1])
    # After the load of the model, after each of its eight pictures, after its memory and its end.
    assert len(kept) == 4 * 11 + 1
    assert result["quality"]["reference"] == "a"
    assert result["quality"]["psnr"]["b"] == pytest.approx(52.9, abs=0.1)


def test_one_that_fails_is_listed_and_not_asked_again(
    made_up: ModuleType, plan: Plan, tmp_path: Path
) -> None:
    contestants = [Contestant("absent", "bf16", made_up.broken), steady(made_up, "fine", 2, tmp_path / "log")]
    result = new_result("bench", "tiny", plan)
    Harness(result, contestants, plan, keep=lambda: None).run(Measured(cold=0, roofline=False))
    assert result["absent"] == {"absent": "ModuleNotFoundError: no module named 'peer'"}
    assert len(result["contestants"]["fine"]["turns"]) == 2
    assert result["contestants"]["absent"]["turns"] == []
    assert result["complete"]


def test_what_was_measured_before_an_interruption_is_kept(
    made_up: ModuleType, plan: Plan, tmp_path: Path
) -> None:
    result, calls = new_result("bench", "tiny", plan), 0

    def keep() -> None:
        nonlocal calls
        calls += 1
        if calls == 15:  # in the second turn, after its third picture
            raise KeyboardInterrupt

    contestants = [steady(made_up, name, 1, tmp_path / "log") for name in ("a", "b")]
    with pytest.raises(KeyboardInterrupt):
        Harness(result, contestants, plan, keep=keep).run(Measured(cold=0, roofline=False))
    assert not result["complete"]
    (first,), (second,) = (each["turns"] for each in result["contestants"].values())
    assert first["complete"]
    assert not second["complete"]
    assert result["quality"]["reference"] == "a", "what was painted is compared"
    assert set(result["quality"]["psnr"]) == {"b"}
    assert sum(len(entry["seconds"]) for entry in second["pictures"]) == 3


def test_first_pictures(made_up: ModuleType, plan: Plan, tmp_path: Path) -> None:
    log = tmp_path / "log"
    contestants = [
        steady(made_up, "a", 1, log, first_picture=made_up.command),
        steady(made_up, "b", 2, log, first_picture=made_up.failing),
        steady(made_up, "c", 3, log),
    ]
    result = new_result("bench", "tiny", plan)
    Harness(result, contestants, plan, keep=lambda: None).run(Measured(cold=2, roofline=False))
    assert [(each["contestant"], each["steps"]) for each in result["cold"]] == [("a", 4), ("b", 4)]
    first, second = result["cold"]
    assert len(first["seconds"]) == len(first["memory"]) == 2
    assert all(10**6 < memory < 10**10 for memory in first["memory"])
    assert second["error"] == "out of paint"


def test_the_roofline_is_measured_with_each_round(
    made_up: ModuleType, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def in_new_process(function: Any, *arguments: Any) -> Any:
        asked.append((function.__name__, *arguments))
        if function.__name__ == "count_bundle":
            raise ImportError("No module named 'onnx'")
        raise RuntimeError("no rate")

    monkeypatch.setattr(harness, "in_new_process", in_new_process)
    contestants = [
        steady(made_up, "a", 1, tmp_path / "log", backend="ort", bundle="some/tiny"),
        steady(made_up, "b", 2, tmp_path / "log"),
    ]
    result = new_result("bench", "tiny", plan)
    Harness(result, contestants, plan, keep=lambda: None).run(Measured(cold=0))
    assert asked[:2] == [("measure_rates", "ort", "fp32", 1)] * 2
    name, bundle, works, guidance = asked[2]
    assert (name, bundle, guidance) == ("count_bundle", "some/tiny", 5.0)
    assert [work.shape for work in works] == [(1, 16, 8), (2, 16, 8)]
    assert result["rates"] == [{"backend": "ort", "precision": "fp32", "round": 0, "error": "no rate"}]
    assert "pip install 'allaprima[bench]'" in result["counts"][0]["error"]
    assert result["contestants"]["a"]["bundle"] == "tiny"


def test_scenarios(made_up: ModuleType, plan: Plan, tmp_path: Path) -> None:
    log = tmp_path / "log"
    contestants = [steady(made_up, "a", 1, log), Contestant("absent", "fp32", made_up.broken)]
    result = new_result("bench", "tiny", plan)
    traffic = Traffic(("single-stream", "offline", "server"), 5, 60.0, loadgen=False)
    Harness(result, contestants, replace(plan, works=plan.works[:2]), keep=lambda: None).run(
        Measured(latency=False, asked=traffic)
    )
    assert [(each["contestant"], each["scenario"], each["steps"]) for each in result["scenarios"]] == [
        ("a", "single-stream", 5),
        ("a", "offline", 5),
        ("a", "server", 5),
    ]
    assert all(each["queries"] == 5 and each["throughput"] > 0 for each in result["scenarios"])
    assert result["scenarios"][2]["bound"] == 60.0
    assert list(result["absent"]) == ["absent"]
    # A warm-up and five queries in each: single stream, offline, and the server's highest rate.
    assert log.read_text().splitlines() == ["1 5 1 16"] * 18


def test_each_scenario_is_opened_for_its_own_batches(made_up: ModuleType, plan: Plan, tmp_path: Path) -> None:
    log = tmp_path / "log"
    contestant = Contestant(
        "a",
        "fp32",
        functools.partial(made_up.told, 1, log),
        build=functools.partial(made_up.build, 1, log),
    )
    result = new_result("bench", "tiny", plan)
    traffic = Traffic(("server", "single-stream", "offline"), 5, 60.0, loadgen=False)
    works = (Work(3, 16, 8, 4),)
    Harness(result, [contestant], replace(plan, works=works), keep=lambda: None).run(
        Measured(latency=False, asked=traffic)
    )
    lines = log.read_text().splitlines()
    assert [line for line in lines if "[" in line] == [
        *("1 build [1]", "1 open [1]", "1 build [3]", "1 open [3]"),
        *("1 build [1, 2, 3]", "1 open [1, 2, 3]"),
    ]
    shape = "1 4 {} 16".format
    assert lines[2:8] == [shape(1)] * 6
    assert lines[10:13] == [shape(3)] * 3, "the warm-up, and five queries in whole batches"
    assert lines[15:19] == [shape(1), shape(2), shape(1), shape(3)], "the first comes again"
    assert result["absent"] == {}
    assert [(each["scenario"], each["batch"], each["queries"]) for each in result["scenarios"]] == [
        *(("single-stream", 1, 5), ("offline", 3, 6), ("server", 3, 5)),
    ]


def test_a_scenario_for_which_nothing_can_be_built(made_up: ModuleType, plan: Plan, tmp_path: Path) -> None:
    contestant = steady(made_up, "a", 1, tmp_path / "log", build=made_up.no_engine)
    result = new_result("bench", "tiny", plan)
    Harness(result, [contestant], plan, keep=lambda: None).run(
        Measured(latency=False, asked=Traffic(("single-stream", "offline"), 5, None, loadgen=False))
    )
    assert [each["error"] for each in result["scenarios"]] == ["ValueError: it cannot be built"] * 2
    assert result["absent"] == {}, "it may have been measured otherwise"
    assert "it cannot be built" in write_report(result, tmp_path)[0].read_text(encoding="utf-8")


def test_engines_are_built_before_the_first_turn(made_up: ModuleType, plan: Plan, tmp_path: Path) -> None:
    log = tmp_path / "log"
    contestants = [
        Contestant(
            str(colour),
            "fp32",
            functools.partial(made_up.told, colour, log),
            build=functools.partial(made_up.build, colour, log),
        )
        for colour in (1, 2)
    ] + [Contestant("fixed", "fp32", made_up.broken, build=made_up.no_engine)]
    result = new_result("bench", "tiny", plan)
    Harness(result, contestants, plan, keep=lambda: None).run(Measured(cold=0, roofline=False))
    said = [line.rpartition(" [")[0] for line in log.read_text().splitlines() if "[" in line]
    assert said == ["1 build", "1 open", "2 build", "2 open", *["1 open", "2 open"] * 2]
    assert result["absent"] == {"fixed": "ValueError: it cannot be built"}
    assert result["complete"]


def test_where_nobody_is_in_fp32_one_picture_is_painted_to_compare_with(
    made_up: ModuleType, plan: Plan, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    contestants = [replace(steady(made_up, name, 1, log), precision="fp16") for name in ("a", "b")]
    result = new_result("bench", "tiny", plan)
    reference = steady(made_up, "diffusers-fp32", 3, tmp_path / "other")
    Harness(result, contestants, plan, keep=lambda: None, reference=reference).run(
        Measured(cold=0, roofline=False)
    )
    assert result["quality"]["reference"] == "diffusers-fp32"
    assert set(result["quality"]["psnr"]) == {"a", "b"}
    assert list(result["contestants"]) == ["a", "b"], "it is not measured"
    assert (tmp_path / "other").read_text().splitlines() == ["3 2 1 16", "3 5 1 16"]

    result = new_result("bench", "tiny", plan)
    reference = Contestant("diffusers-fp32", "fp32", made_up.broken)
    Harness(result, contestants, plan, keep=lambda: None, reference=reference).run(
        Measured(cold=0, roofline=False)
    )
    assert result["quality"] == {}
    assert "diffusers-fp32 failed: ModuleNotFoundError: no module named 'peer'" in result["notes"][0]
    assert result["complete"]


def test_what_cannot_be_counted_is_a_note(
    made_up: ModuleType, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_new_process(function: Any, *arguments: Any) -> Any:
        raise ValueError("shapes do not agree")

    monkeypatch.setattr(harness, "in_new_process", in_new_process)
    result = new_result("bench", "tiny", plan)
    contestant = steady(made_up, "a", 1, tmp_path / "log", backend="ort", bundle="some/tiny")
    Harness(result, [contestant], plan, keep=lambda: None).run(Measured(cold=0))
    assert result["counts"] == [{"bundle": "tiny", "error": "ValueError: shapes do not agree"}]
    assert result["complete"]
