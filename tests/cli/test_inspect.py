"""`allaprima inspect`: bundles and pictures, as a table and as JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from allaprima.bundle import VERSION, Manifest
from allaprima.runtime import Parameters, save_image

Allaprima = Callable[..., SimpleNamespace]
WriteBundle = Callable[..., Path]


def test_bundle_table(allaprima: Allaprima, tmp_path: Path, write_bundle: WriteBundle) -> None:
    outcome = allaprima("inspect", str(write_bundle(tmp_path / "tiny")))
    assert outcome.code == 0
    for text in ("tiny", "stable-diffusion", "fp16", "DDIMScheduler", "7.0 kB in 3 files"):
        assert text in outcome.out
    assert "sample float32 [B, 4, H, W]" in outcome.out
    assert "2.5e-03" in outcome.out


def test_bundle_json(allaprima: Allaprima, tmp_path: Path, write_bundle: WriteBundle) -> None:
    folder = write_bundle(tmp_path / "tiny")
    document = json.loads(allaprima("inspect", str(folder), "--json", "--verify").out)
    assert document["kind"] == "bundle"
    assert document["verified"] is True
    assert document["bytes"] == 7007
    assert Manifest.from_json(document["manifest"]).name == "tiny"


def test_verify(allaprima: Allaprima, tmp_path: Path, write_bundle: WriteBundle) -> None:
    folder = write_bundle(tmp_path / "tiny")
    (folder / "denoiser" / "model.onnx").write_bytes(b"GRAPH")
    assert allaprima("inspect", str(folder)).code == 0
    outcome = allaprima("inspect", str(folder), "--verify")
    assert outcome.code == 2
    assert "model.onnx is corrupt" in outcome.err


def test_picture(allaprima: Allaprima, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    parameters = Parameters(
        prompt="a [red] circle :cat:",
        negative_prompt="",
        num_inference_steps=20,
        guidance_scale=5.0,
        sampler="ddim",
        seed=7,
        height=64,
        width=64,
        eta=0.0,
        bundle="shapes",
        backend="ort",
        precision="fp32",
        version=VERSION,
    )
    save_image(Image.new("RGB", (64, 64)), path, parameters)
    out = allaprima("inspect", str(path)).out
    assert "a [red] circle :cat:" in out
    document = json.loads(allaprima("inspect", str(path), "--json").out)
    assert document["kind"] == "picture"
    assert document["parameters"]["seed"] == 7


@pytest.mark.parametrize("name", ["", "none", "folder", "text.png"])
def test_neither(allaprima: Allaprima, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("text.png").write_text("no picture")
    outcome = allaprima("inspect", name)
    assert outcome.code == 2
    assert outcome.err.startswith("allaprima: error: ")
    assert outcome.err.count("\n") == 1
