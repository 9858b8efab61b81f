"""The benchmark of startup: who starts, what is counted, and what becomes of one that fails."""

import json
import sys
from pathlib import Path

import pytest

from allaprima.benchmarks import startup
from allaprima.benchmarks.checkpoints import SHAPES
from allaprima.benchmarks.contestants import Model
from allaprima.benchmarks.startup import Starter
from allaprima.bundle import RequestError

PAINT = "import sys; block = bytearray(50_000_000); open(sys.argv[1], 'wb').write(b'picture')"


def test_a_process_is_timed_and_weighed(tmp_path: Path) -> None:
    starter = Starter("one", [sys.executable, "-c", PAINT])
    broken = Starter("two", [sys.executable, "-c", "raise SystemExit('no weights')"])
    idle = Starter("three", [sys.executable, "-c", ""])
    startup.measure([starter, broken, idle], 2, tmp_path, tmp_path / "cache")
    assert len(starter.seconds) == len(starter.memory) == 2  # the first was not counted
    assert all(0 < seconds < 60 for seconds in starter.seconds)
    assert all(size > 50e6 for size in starter.memory)
    assert (broken.seconds, broken.error) == ([], "no weights")
    assert idle.error == "exit status 0"
    lines = startup.tabulate([starter, broken])
    assert "one" in lines[2]
    assert "no weights" in lines[3]


def test_everybody_who_works_here_starts(tmp_path: Path) -> None:
    names = [each.name for each in startup.starters(Model(SHAPES, tmp_path), 3)]
    assert {"allaprima-openvino", "allaprima-ort", "diffusers-fp32", "diffusers-bf16"} <= set(names)


def test_the_result_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "export_bundles", lambda *args: None)
    monkeypatch.setattr(startup, "starters", lambda *args: [Starter("one", [sys.executable, "-c", PAINT])])
    startup.main(["--model", "shapes", "--rounds", "1", "--results", str(tmp_path)])
    result = json.loads((tmp_path / "startup-shapes.json").read_text())
    assert [each["name"] for each in result["contestants"]] == ["one"]
    assert "| one |" in (tmp_path / "startup-shapes.md").read_text()
    with pytest.raises(RequestError, match="0 rounds"):
        startup.main(["--model", "shapes", "--rounds", "0", "--results", str(tmp_path)])
