"""The benchmark of step caching: figures, plots and what is written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allaprima.benchmarks import step_cache
from allaprima.benchmarks.step_cache import describe, tabulate
from allaprima.models.shapes.evaluate import held_out
from allaprima.runtime import Pipeline


def test_figures() -> None:
    scenes, _ = held_out(2)
    white, grey = (np.full((128, 128, 3), level, np.uint8) for level in (255, 254))
    painted = {1: [(white, 2.0), (white, 4.0)], 3: [(white, 1.0), (grey, 1.0)]}
    found = describe(scenes, painted)
    assert found["1"] == {"seconds": 3.0, "things": 0.0, "relation": found["1"]["relation"]}
    likeness = found["3"]["psnr"]
    assert likeness == {
        "smallest": pytest.approx(48.13, abs=0.01),
        "median": pytest.approx(73.6, abs=0.1),
        "below 35": 0,
    }
    first, second = tabulate(found)[2:]
    assert first.startswith("| 1 | 3.000 | 1.00 | 0.0% |")
    assert "| 1.000 | 3.00 |" in second


def test_the_result_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pipeline that takes the built-in bundle, and caches nothing."""
    asked: list[int] = []
    whole = Pipeline.generate

    def generate(self: Pipeline, prompt: str, *, cache_interval: int, **options: Any) -> Any:
        asked.append(cache_interval)
        return whole(self, prompt, **{**options, "seed": options["seed"] + cache_interval})

    monkeypatch.setattr(step_cache, "export_bundles", lambda *_: None)
    monkeypatch.setattr(Pipeline, "generate", generate)
    (tmp_path / "shapes-fp16-step-cache-1").symlink_to(Pipeline.open("shapes", backend="ort").bundle.folder)
    words = ["--count", "2", "--steps", "3", "--intervals", "1", "4", "--precision", "fp16"]
    step_cache.main([*words, "--bundles", str(tmp_path), "--results", str(tmp_path)])
    assert asked == [1, 1, 1, 4, 4, 4]
    result = json.loads((tmp_path / "step-cache-shapes.json").read_text())
    assert (result["captions"], result["steps"], result["like_for_like"]) == (2, 3, False)
    assert list(result["results"]) == ["1", "4"]
    page = (tmp_path / "step-cache-shapes.md").read_text()
    assert "**not like for like**" in page
    for name in ("psnr", "score"):
        assert f'src="step-cache-shapes-{name}.svg"' in page
        for suffix in ("", "-dark"):
            assert (tmp_path / f"step-cache-shapes-{name}{suffix}.svg").read_text().startswith("<?xml")


def test_another_bundle_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    whole = Pipeline.generate

    def generate(self: Pipeline, prompt: str, *, cache_interval: int, **options: Any) -> Any:
        asked.append((cache_interval, options["num_inference_steps"]))
        return whole(self, prompt, **options)

    monkeypatch.setattr(Pipeline, "generate", generate)
    folder = Pipeline.open("shapes", backend="ort").bundle.folder
    words = ["--steps", "3", "--intervals", "1", "2", "--rounds", "2", "--size", "64x64", "--backend", "ort"]
    step_cache.main([str(folder), *words, "--results", str(tmp_path)])
    assert asked == [(1, 2), (1, 3), (2, 2), (2, 3)] * 2
    result = json.loads((tmp_path / "step-cache-seconds-shapes.json").read_text())
    assert [len(each) for each in result["seconds"].values()] == [2, 2]
    assert result["size"] == [64, 64]
    page = (tmp_path / "step-cache-seconds-shapes.md").read_text()
    assert "shapes: one picture of 64x64 in 3 steps" in page
    assert "**Not like for like**" in page


def test_a_bundle_without_cached_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Pipeline.open("shapes", backend="ort").bundle.folder
    with pytest.raises(SystemExit):
        step_cache.main([str(folder), "--steps", "2", "--rounds", "1", "--results", str(tmp_path)])
    assert "--step-cache" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--rounds", "0"],
        ["--count", "0"],
        ["--steps", "0"],
        ["--intervals", "2", "3"],
        ["--intervals", "1"],
        ["--layers", "0"],
    ],
)
def test_bad_options(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit):
        step_cache.main([*words, "--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())
