"""The harness with contestants that only pretend to paint, and with processes that are real."""

import json
import os
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from allaprima.benchmarks import compare
from allaprima.benchmarks.contestants import REFERENCE, Contestant, Model, Paint, Settings
from allaprima.benchmarks.process import in_new_process, peak_memory
from allaprima.benchmarks.real_size import Meter
from allaprima.bundle import RequestError

Write = Callable[..., Path]


class Fakes:
    """Contestants that note what they are asked for."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Path, str, int]] = []

    def make(self, name: str, weights: str | None, colour: int) -> Contestant:
        def open_fake(source: Path, precision: str, settings: Settings) -> Paint:
            def paint(steps: int) -> Image.Image:
                self.log.append((name, source, precision, steps))
                return Image.new("RGB", (settings.width, settings.height), (colour, 0, 0))

            return paint

        return Contestant(name, "fp32", weights, open_fake)


def fail(source: Path, precision: str, settings: Settings) -> Paint:
    raise ModuleNotFoundError("no module named 'peer'")


def here(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


@pytest.fixture
def fakes() -> Fakes:
    return Fakes()


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(tmp_path / "tiny", tmp_path / "bundles")


SETTINGS = Settings("a red circle", "ddim", 7, 5.0, height=16, width=24, threads=1)


def test_contestants_take_turns_and_warm_up(
    fakes: Fakes, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "in_new_process", here)
    contestants = [fakes.make("a", "fp16", 1), fakes.make("b", None, 2)]
    plan = compare.Plan(steps=(2, 5), rounds=2, repeats=2)
    outcomes = compare.measure(contestants, model, SETTINGS, plan, tmp_path)
    turn = [2, 2, 5, 2, 5]
    assert [(name, steps) for name, _, _, steps in fakes.log] == [
        (name, steps) for name in "abab" for steps in turn
    ]
    assert {(name, source) for name, source, _, _ in fakes.log} == {
        ("a", model.bundles / "tiny-fp16"),
        ("b", model.checkpoint),
    }
    assert [len(outcome.trials) for outcome in outcomes] == [2, 2]
    assert all(trial.memory > 0 for outcome in outcomes for trial in outcome.trials)


def test_one_that_fails_is_listed_with_the_reason_and_not_asked_again(
    fakes: Fakes, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(function: Callable[..., Any], contestant: Contestant, *arguments: Any) -> Any:
        if contestant.name == "killed":
            raise BrokenProcessPool
        return function(contestant, *arguments)

    monkeypatch.setattr(compare, "in_new_process", killed)
    contestants = [
        Contestant("absent", "bf16", None, fail),
        fakes.make("killed", None, 1),
        fakes.make("fine", None, 2),
    ]
    told: list[str] = []
    plan = compare.Plan((1, 2), rounds=2, repeats=1)
    kept: list[set[str]] = []
    outcomes = compare.measure(
        contestants,
        model,
        SETTINGS,
        plan,
        tmp_path,
        tell=told.append,
        keep=lambda outcomes: kept.append(set(compare.describe(outcomes, plan.steps))),
    )
    results = compare.describe(outcomes, plan.steps)
    assert results["absent"]["error"] == "ModuleNotFoundError: no module named 'peer'"
    assert "memory" in results["killed"]["error"]
    assert results["fine"]["psnr"] is None
    assert len(told) == 4
    assert kept == [{"absent"}, {"absent", "killed"}, *[{"absent", "killed", "fine"}] * 2]
    assert compare.tabulate(results, plan.steps)[-2:] == [
        "absent failed: ModuleNotFoundError: no module named 'peer'",
        "killed failed: the process was killed, perhaps for want of memory",
    ]


def test_the_command_writes_json_and_a_table(
    fakes: Fakes,
    tmp_path: Path,
    write_bundle: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    contestants = {"a": fakes.make("a", "fp16", 10), REFERENCE: fakes.make(REFERENCE, None, 11)}
    monkeypatch.setattr(compare, "CONTESTANTS", contestants)
    monkeypatch.setattr(compare, "in_new_process", here)
    monkeypatch.setattr(compare, "_export", lambda model, precision: write_bundle(model.bundle(precision)))
    (tmp_path / "tiny").mkdir()
    command = ["--model", str(tmp_path / "tiny"), "--bundles", str(tmp_path / "bundles"), "--steps", "1", "3"]
    compare.main([*command, "--results", str(tmp_path / "results"), "--rounds", "2", "--threads", "1"])
    result = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert result["schema"] == 1
    assert result["settings"]["height"] == 128
    assert result["plan"] == {"steps": [1, 3], "rounds": 2, "repeats": 1}
    assert result["contestants"]["a"]["psnr"] > 50
    assert result["contestants"][REFERENCE]["psnr"] is None
    assert result["machine"]["cores"] >= 1
    text = (tmp_path / "results" / "tiny.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert f"| {REFERENCE} |" in text
    assert "python -m allaprima.benchmarks.compare --model" in text


def test_bundles_are_exported_when_missing_or_older(
    model: Model, write_bundle: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.checkpoint.mkdir()
    weights = model.checkpoint / "weights"
    weights.write_bytes(b"")
    monkeypatch.setattr(compare, "in_new_process", here)
    monkeypatch.setattr(
        compare, "_export", lambda model, precision: write_bundle(model.bundle(precision), overwrite=True)
    )
    told: list[str] = []
    for _ in range(2):
        compare.export_bundles(model, ["fp16", "fp32"], told.append)
    assert told == ["exporting tiny in fp16", "exporting tiny in fp32"]
    newer = (model.bundle("fp16") / "bundle.json").stat().st_mtime + 10
    os.utime(weights, (newer, newer))
    compare.export_bundles(model, ["fp16"], told.append)
    assert told[2:] == ["exporting tiny in fp16"]


@pytest.mark.parametrize(
    ("steps", "rounds", "repeats"), [((2, 2), 1, 1), ((0, 2), 1, 1), ((1, 2), 0, 1), ((1, 2), 1, 0)]
)
def test_a_plan_that_measures_nothing_is_refused(steps: tuple[int, int], rounds: int, repeats: int) -> None:
    with pytest.raises(RequestError, match="1 <= few < many"):
        compare.Plan(steps, rounds, repeats)


def test_a_refusal_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        compare.main(["--model", "shapes", "--rounds", "0"])
    assert leaving.value.code == 2
    assert "at least 1 round" in capsys.readouterr().err


def test_a_model_is_named_after_its_folder() -> None:
    assert Model(Path("models/shapes/checkpoint"), Path()).name == "shapes"
    assert Model(Path("some/sd15-random"), Path("b")).bundle("fp16") == Path("b/sd15-random-fp16")


def test_a_new_process_is_another_one_and_gives_back_results_and_errors() -> None:
    assert in_new_process(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        in_new_process(int, "x")
    with pytest.raises(BrokenProcessPool):
        in_new_process(os._exit, 3)


def test_peak_memory_is_in_bytes() -> None:
    assert 10**7 < peak_memory() < 10**12


def test_a_meter_closes_each_stage_when_the_next_begins() -> None:
    meter = Meter("first")
    meter.enter("second")
    meter.enter("end")
    assert [cost.stage for cost in meter.costs] == ["first", "second"]
    assert all(cost.seconds >= 0 and cost.memory > 0 for cost in meter.costs)
