"""Contestants that only pretend to paint, in a module that a new process can import."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from allaprima.benchmarks.plan import Plan, Settings, Work
from allaprima.benchmarks.result import Result, new_result

SOURCE = """
import os
import sys
from PIL import Image
from allaprima.benchmarks.clock import Share
from allaprima.benchmarks.contestants import Painted


class Painter:
    def __init__(self, colour, log, dies_at=None):
        self.colour, self.log, self.dies_at, self.count = colour, log, dies_at, 0

    def paint(self, work):
        self.count += 1
        if self.count == self.dies_at:
            os._exit(3)
        with open(self.log, "a") as file:
            file.write(f"{self.colour} {work.steps} {work.batch} {work.width}\\n")
        images = [Image.new("RGB", (work.width, work.height), (self.colour, 0, 0))] * work.batch
        stages = {"text": 0.0, "denoise": 0.0, "decode": 0.0}
        return Painted(images, stages, {"denoiser": Share(0.0, work.steps)})

    def host_memory(self):
        return None

    def close(self):
        pass


def steady(colour, log, settings, works):
    return Painter(colour, log)


def told(colour, log, settings, works):
    # As steady, and says what it is opened for.
    with open(log, "a") as file:
        file.write(f"{colour} open {[work.batch for work in works]}\\n")
    return Painter(colour, log)


def build(colour, log, works):
    with open(log, "a") as file:
        file.write(f"{colour} build {[work.batch for work in works]}\\n")


def no_engine(works):
    raise ValueError("it cannot be built")


def dying(colour, log, settings, works):
    return Painter(colour, log, dies_at=3)


def broken(settings, works):
    raise ModuleNotFoundError("no module named 'peer'")


def command(settings, work, picture):
    code = f"from PIL import Image; Image.new('RGB', (8, 8)).save({str(picture)!r})"
    return [sys.executable, "-c", code]


def failing(settings, work, picture):
    return [sys.executable, "-c", "import sys; sys.exit('out of paint')"]
"""

SETTINGS = Settings("a red circle", "ddim", 7, 5.0, threads=1)


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module above, where a new process finds it too."""
    (tmp_path / "made_up_contestants.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.delitem(importlib.sys.modules, "made_up_contestants", raising=False)  # type: ignore[attr-defined]
    return importlib.import_module("made_up_contestants")


@pytest.fixture
def plan() -> Plan:
    """Two step counts at two batches."""
    works = tuple(Work(batch, 16, 8, steps) for batch in (1, 2) for steps in (1, 5))
    return Plan(works, SETTINGS, rounds=2, repeats=2)


def entry(steps: int, seconds: list[float], **others: Any) -> dict[str, Any]:
    """What a turn holds of one configuration."""
    work = {"batch": 1, "width": 64, "height": 64, "steps": steps}
    return {**work, "seconds": seconds, "png": [0.001] * len(seconds), "stages": {}, "engine": None, **others}


@pytest.fixture
def result(plan: Plan) -> Result:
    """A result with two contestants, three rounds and steps of 1, 4 and 8: 1 + 2 * steps, and twice that."""
    made = new_result("allaprima bench", "tiny", plan)
    for factor, name in ((1, "quick"), (2, "slow")):
        turns = []
        for number, mood in enumerate((0.99, 1.0, 1.01)):
            pictures = []
            for steps in (1, 4, 8):
                seconds = factor * mood * (1 + 2 * steps)
                denoise = factor * mood * 2 * steps
                pictures.append(
                    entry(
                        steps,
                        [seconds] * 3,
                        stages={"text": [0.1] * 3, "denoise": [denoise] * 3, "decode": [0.2] * 3},
                        engine={
                            "denoiser": {"seconds": [denoise] * 3, "calls": steps},
                            "vae_decoder": {"seconds": [0.2] * 3, "calls": 1},
                        },
                    )
                )
            turns.append(
                {"round": number, "complete": True, "load": 0.5, "memory": 10**8, "device_memory": None}
                | {"pictures": pictures}
            )
        made["contestants"][name] = {"precision": "fp32", "backend": "ort", "bundle": "tiny", "turns": turns}
    made["rates"] = [
        {"backend": "ort", "precision": "fp32", "round": 0, "operations": 1e10, "bandwidth": 1e9, "how": "so"}
    ]
    made["counts"] = [
        {"bundle": "tiny", "component": "denoiser", "shape": [1, 64, 64]}
        | {"operations": {"Conv": 10**9}, "weights": 10**7, "activations": 15 * 10**6},
        {"bundle": "tiny", "component": "vae_decoder", "shape": [1, 64, 64], "error": "cannot be counted"},
    ]
    made["complete"] = True
    return made
