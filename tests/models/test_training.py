"""A training stage that is stopped and resumed ends where it would have ended anyway, to the last bit."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allaprima.models.shapes.training import Plan, Stage, batches, device, generator, psnr

PLAN = Plan(10, 0.05, warmup=3, cooldown=0.4, decay=0.9)


def make() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = (torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
    return torch.nn.Sequential(*layers).to(device())


def run(folder: Path, until: int | None = None, plan: Plan = PLAN, every: int = 250) -> Stage:
    """A fresh process's share of the training: model and stage are made anew."""
    stage = Stage(folder, make(), plan, every)

    def loss_of(step: int) -> torch.Tensor:
        batch = generator(3, 7, step).normal(size=(16, 4)).astype(np.float32)
        x = torch.from_numpy(batch).to(device())
        loss: torch.Tensor = (stage.model(x) - x.sum(1, keepdim=True)).square().mean()
        return loss

    stage.train(loss_of, until)
    return stage


def parts(stage: Stage) -> dict[str, Any]:
    optimizer = stage.optimizer.state_dict()["state"]
    moments = {
        f"{index}.{name}": value for index, state in optimizer.items() for name, value in state.items()
    }
    return {**stage.model.state_dict(), **{f"average.{k}": v for k, v in stage.average.items()}, **moments}


def assert_same(a: Stage, b: Stage) -> None:
    assert a.step == b.step
    assert parts(a).keys() == parts(b).keys()
    for name, value in parts(a).items():
        assert torch.equal(value, parts(b)[name]), name


def test_resuming_is_exact(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", until=5)
    resumed = run(tmp_path / "parts")
    assert whole.step == 10
    assert_same(whole, resumed)
    whole.finish()
    resumed.finish()
    assert_same(whole, resumed)
    assert not resumed.model.training


def test_one_step_at_a_time(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", until=4)
    for step in range(1, 5):
        stage = run(tmp_path / "parts", until=step)
    assert_same(whole, stage)


def test_a_finished_stage_does_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "state.pt").read_bytes(), (tmp_path / "log.jsonl").read_text()
    assert_same(run(tmp_path), run(tmp_path))
    assert ((tmp_path / "state.pt").read_bytes(), (tmp_path / "log.jsonl").read_text()) == before


def test_it_learns(tmp_path: Path) -> None:
    run(tmp_path, plan=Plan(200, 0.02, warmup=10, decay=0.9))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [50, 100, 150, 200]
    assert log[-1]["loss"] < 0.2 * log[0]["loss"]


def test_the_log_tells_the_mean_loss(tmp_path: Path) -> None:
    """Whatever step the stage was resumed at."""
    for until in (5, 60):
        model = make()
        weight = next(model.parameters())
        Stage(tmp_path, model, Plan(100, 0.0)).train(lambda step, w=weight: 0 * w.sum() + step, until)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    wanted = [range(5), range(5, 50), range(50, 60)]
    assert [entry["step"] for entry in log] == [steps.stop for steps in wanted]
    assert [entry["loss"] for entry in log] == [np.mean(steps) for steps in wanted]


def test_states_are_saved_on_the_way(tmp_path: Path) -> None:
    """A killed run goes on from the last state, and ends the same."""
    whole = run(tmp_path / "whole")
    stage = Stage(tmp_path / "killed", make(), PLAN, every=3)

    def loss_of(step: int) -> torch.Tensor:
        if step == 8:
            raise KeyboardInterrupt
        x = torch.from_numpy(generator(3, 7, step).normal(size=(16, 4)).astype(np.float32)).to(device())
        loss: torch.Tensor = (stage.model(x) - x.sum(1, keepdim=True)).square().mean()
        return loss

    with pytest.raises(KeyboardInterrupt):
        stage.train(loss_of)
    assert Stage(tmp_path / "killed", make(), PLAN).step == 6
    assert_same(whole, run(tmp_path / "killed"))


def test_a_kill_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = run(tmp_path, until=5)

    def half(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            stage.save()
    assert_same(run(tmp_path / "other"), run(tmp_path))


def test_rate() -> None:
    plan = Plan(100, 2.0, warmup=10, cooldown=0.2)
    rates = [plan.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert set(rates[9:81]) == {2.0}
    assert rates[80:] == pytest.approx([2.0 * left / 20 for left in range(20, 0, -1)])


def test_streams_depend_on_their_numbers_alone() -> None:
    assert generator(1, 2, 3).random() == generator(1, 2, 3).random()
    assert len({generator(1, 2, step).random() for step in range(100)}) == 100


def test_batches() -> None:
    assert [range(7)[part] for part in batches(7, 3)] == [range(3), range(3, 6), range(6, 7)]
    assert list(batches(0, 3)) == []


def test_psnr() -> None:
    a = torch.zeros(4)
    assert psnr(a, a + 0.2) == pytest.approx(20.0, abs=1e-4)
    assert math.isfinite(psnr(a, a))
