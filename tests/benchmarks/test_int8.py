"""The benchmarks of int8: figures, and what is written."""

import json
from pathlib import Path

import numpy as np
import pytest

from allaprima.benchmarks import int8, int8_step
from allaprima.benchmarks.int8 import describe, tabulate, training_captions
from allaprima.bundle import BundleWriter, open_bundle, resolve
from allaprima.models.shapes.evaluate import held_out


def test_figures() -> None:
    pytest.importorskip("skimage")
    scenes, _ = held_out(2)
    white, grey = (np.full((128, 128, 3), level, np.uint8) for level in (255, 254))
    painted = {"plain": [(white, 2.0), (white, 4.0)], "int8": [(white, 1.0), (grey, 1.0)]}
    found = describe(scenes, painted)
    assert found["plain"] == {"seconds": 3.0, "things": 0.0, "relation": found["plain"]["relation"]}
    assert found["int8"]["psnr"] == {
        "smallest": pytest.approx(48.13, abs=0.01),
        "median": pytest.approx(73.6, abs=0.1),
        "below 35": 0,
    }
    assert found["int8"]["ssim"] == pytest.approx(1, abs=1e-3)
    first, second = tabulate(found)[2:]
    assert first.startswith("| plain | 3.000 | 0.0% |")
    assert first.endswith("| – | – | – | – |")
    assert "| 48.1 dB | 0 | 1.0000 |" in second


def test_calibration_sees_no_held_out_caption() -> None:
    texts = training_captions(40)
    assert len(set(texts)) > 30
    assert texts == training_captions(40)
    assert not set(texts) & set(held_out(300)[1])


def test_the_result_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    ways = (int8.Way("ort", "fp16"), int8.Way("ort", "fp16", "int8"))
    monkeypatch.setattr(int8, "WAYS", ways)
    monkeypatch.setattr(int8, "QUANTIZED", {"int8": None})
    words = ["--count", "2", "--samples", "1", "--steps", "2", "--note", "Loud."]
    int8.main([*words, "--bundles", str(tmp_path / "bundles"), "--results", str(tmp_path)])
    result = json.loads((tmp_path / "int8-shapes.json").read_text())
    assert list(result["results"]) == ["ort fp16", "ort int8+fp16"]
    assert result["quantized"]["int8"]["samples"] == 1
    page = (tmp_path / "int8-shapes.md").read_text()
    assert "taking turns. Ranges are those of 1 pictures of other captions. Loud." in page
    assert "| int8 | all layers | " in page


def test_a_step_is_timed(tmp_path: Path) -> None:
    """Of a bundle that says that it is quantized: its graph is the built-in one."""
    source = open_bundle(resolve("shapes"))
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    component = source.component("denoiser").to_json()
    said = {"dtype": "int8", "layers": 1, "total": 2, "error": 0.1, "held_out": 1, "samples": 1, "steps": 1}
    for target, more in ((plain, {}), (quantized, {"quantization": said})):
        with BundleWriter(target) as writer:
            for name in source.manifest.files:
                (writer.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (writer.folder / name).write_bytes(source.path(name).read_bytes())
            document = source.manifest.to_json()
            document["components"]["denoiser"] = component | more
            writer.commit(type(source.manifest).from_json(document))
    words = [str(plain), str(quantized), "--size", "64x32", "--rounds", "2", "--results", str(tmp_path)]
    int8_step.main([*words, "--backend", "ort"])
    result = json.loads((tmp_path / "int8-step-plain-ort.json").read_text())
    assert {name: len(each) for name, each in result["seconds"].items()} == {"fp32": 2, "int8+fp32": 2}
    assert (result["width"], result["height"], len(result["ratios"])) == (64, 32, 2)
    assert "int8 is " in (tmp_path / "int8-step-plain-ort.md").read_text()
    with pytest.raises(SystemExit):
        int8_step.main([str(plain), str(plain), "--size", "64x32", "--backend", "ort"])


@pytest.mark.parametrize("words", [["--count", "0"], ["--steps", "0"], ["--samples", "0"]])
def test_bad_options(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit):
        int8.main([*words, "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        int8_step.main(["a", "b", "--rounds", "0"])
    assert not list(tmp_path.iterdir())
