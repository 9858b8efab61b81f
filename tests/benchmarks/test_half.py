"""The benchmark of half precision: what is compared, and what is written."""

import json
from pathlib import Path

import pytest

from allaprima.benchmarks import half
from allaprima.benchmarks.half import Way, describe
from allaprima.bundle import resolve
from allaprima.models.shapes.checker import Score


def test_figures() -> None:
    found = describe(Score(4, 0.75, 1.0, (2,)), [50.0, 30.0, 40.0, 41.0])
    assert found["psnr"] == {"smallest": 30.0, "median": 40.5, "below 35": 1}
    assert describe(Score(4, 0.75, 1.0, (2,)), []) == {"things": 0.75, "relation": 1.0}


def test_the_result_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in bundle stands for both."""
    (tmp_path / "shapes-fp16").symlink_to(resolve("shapes"))
    monkeypatch.setattr(half, "export_bundles", lambda *args: None)
    monkeypatch.setattr(half, "WAYS", (Way("ort", "fp16", "fp16"), Way("openvino", "fp32", "fp16")))
    half.main(["--count", "3", "--bundles", str(tmp_path), "--results", str(tmp_path)])
    result = json.loads((tmp_path / "half-shapes.json").read_text())
    assert result["captions"] == 3
    assert result["results"]["openvino-fp32"]["psnr"]["smallest"] > 50
    assert "psnr" not in result["results"]["ort-fp16"]
    assert "| openvino-fp32 |" in (tmp_path / "half-shapes.md").read_text()


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_no_captions(tmp_path: Path, count: str) -> None:
    with pytest.raises(SystemExit):
        half.main(["--count", count, "--results", str(tmp_path)])
