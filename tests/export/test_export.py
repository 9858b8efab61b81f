"""From checkpoint to bundle: all of it, or nothing at all."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from transformers import CLIPTokenizer

import allaprima.export.checkpoint
from allaprima.bundle import VERSION, Bundle, BundleError, ExportError, open_bundle
from allaprima.export import Progress, export_checkpoint
from allaprima.export.graph import GraphPlan
from allaprima.runtime.tokenizer import Tokenizer

Copy = Callable[..., None]


@pytest.fixture
def traced(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Copy:
    """Tracing replaced by a copy of what it gave before, which is a matter of minutes; all else is real."""

    def copy(plan: GraphPlan, path: Path, **_: object) -> None:
        shutil.copytree(tiny_bundle.path(plan.name), path.parent, dirs_exist_ok=True)

    monkeypatch.setattr(allaprima.export.checkpoint, "write_graph", copy)
    # There is nothing to free, and looking for it takes a second once something was traced in this process.
    monkeypatch.setattr(gc, "collect", lambda: 0)
    return copy


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be traced."""

    def refuse(plan: GraphPlan, path: Path) -> None:
        raise AssertionError(f"{plan.name} is traced")

    monkeypatch.setattr(allaprima.export.checkpoint, "write_graph", refuse)


def test_the_bundle(tiny_bundle: Bundle, tiny_checkpoint: Path) -> None:
    bundle = open_bundle(tiny_bundle.folder, verify=True)
    assert bundle == tiny_bundle
    manifest = bundle.manifest
    assert (manifest.name, manifest.family, manifest.precision) == ("tiny", "stable-diffusion", "fp32")
    assert manifest.history == 4
    assert manifest.versions["allaprima"] == VERSION
    assert {"torch", "diffusers", "transformers", "onnx", "onnxscript"} < set(manifest.versions)
    parts = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")
    assert set(manifest.files) == {
        "tokenizer/tokenizer.json",
        *(
            f"{part}/{file}"
            for part in parts
            for file in ("float32.onnx", "model.onnx", "weights.safetensors")
        ),
    }
    text = (bundle.folder / "bundle.json").read_text()
    assert str(tiny_checkpoint.parent) not in text
    assert "site-packages" not in text


@pytest.mark.parametrize("prompt", ["", "a small Red circle, above it: 2 blue squares!", "é 猫 " * 60])
def test_the_tokenizer(tiny_bundle: Bundle, tiny_checkpoint: Path, prompt: str) -> None:
    wanted = CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    ids = wanted(prompt, padding="max_length", truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(Tokenizer(tiny_bundle).encode(prompt).ids, ids[0])


def test_export(tiny_checkpoint: Path, tiny_bundle: Bundle, traced: Copy, tmp_path: Path) -> None:
    stages: list[Progress] = []
    target = tmp_path / "deep" / "down" / "painter"
    bundle = export_checkpoint(str(tiny_checkpoint), target, precision="fp32", progress=stages.append)
    assert open_bundle(target, verify=True) == bundle
    assert bundle.manifest.name == "painter"
    assert bundle.manifest.files == tiny_bundle.manifest.files
    assert [stage.done for stage in stages] == list(range(13))
    assert {stage.total for stage in stages} == {13}
    assert [stage.stage for stage in stages[3:6]] == [
        "denoiser: load",
        "denoiser: trace",
        "denoiser: check",
    ]
    assert [path.name for path in target.parent.iterdir()] == ["painter"]
    with pytest.raises(BundleError, match="exists already"):
        export_checkpoint(str(tiny_checkpoint), target, precision="fp32")
    again = export_checkpoint(str(tiny_checkpoint), target, precision="fp32", name="brush", overwrite=True)
    assert open_bundle(target).manifest.name == again.manifest.name == "brush"


def test_unknown_precision(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="unknown precision 'int8': choose fp16, fp32 or bf16"):
        export_checkpoint("nowhere", tmp_path / "out", precision="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("source", ["", "missing", "file", "empty folder", "no unet", "pickled", "widened"])
def test_a_bad_checkpoint_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, source: str) -> None:
    folder = tmp_path / "in" / source
    if source == "file":
        folder.parent.mkdir()
        folder.write_text("")
    elif source == "empty folder":
        folder.mkdir(parents=True)
    elif source in ("no unet", "pickled", "widened"):
        shutil.copytree(tiny_checkpoint, folder)
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        config = folder / "unet" / "config.json"
        if source == "no unet":
            shutil.rmtree(weights.parent)
        elif source == "pickled":
            weights.rename(weights.with_suffix(".bin"))
        else:
            config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 8'))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError):
        export_checkpoint(str(folder) if source else "", tmp_path / "deep" / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("untraced")
def test_a_target_that_is_in_the_way(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for target, message in (
        (tmp_path / "mine", "exists and is not a bundle"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "out", "cannot be written"),
    ):
        with pytest.raises(BundleError, match=message):
            export_checkpoint(str(tiny_checkpoint), target, overwrite=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "thesis.txt"]


@pytest.mark.parametrize("stop", [ExportError("no"), KeyboardInterrupt(), MemoryError()], ids=type)
def test_an_export_that_stops_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, traced: Copy, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    def write_graph(plan: GraphPlan, path: Path, **_: object) -> None:
        traced(plan, path)
        if plan.name == "denoiser":
            raise stop

    monkeypatch.setattr(allaprima.export.checkpoint, "write_graph", write_graph)
    with pytest.raises(type(stop)):
        export_checkpoint(str(tiny_checkpoint), tmp_path / "deep" / "out", precision="fp32")
    assert list(tmp_path.iterdir()) == []


def test_a_callback_may_stop_an_export(tiny_checkpoint: Path, tmp_path: Path, traced: Copy) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        export_checkpoint(str(tiny_checkpoint), tmp_path / "out", precision="fp32", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_wrong_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, traced: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it touch the bundle that it was to replace."""
    target = tmp_path / "out"
    export_checkpoint(str(tiny_checkpoint), target, precision="fp32", name="old")

    def write_graph(plan: GraphPlan, path: Path, **_: object) -> None:
        traced(plan, path)
        if plan.name == "denoiser":
            model: Any = onnx.load(path)
            (bias,) = (one for one in model.graph.initializer if one.name == "unet.conv_out.bias")
            value = onnx.numpy_helper.to_array(bias) + np.float32(0.5)
            bias.CopyFrom(onnx.numpy_helper.from_array(value, bias.name))
            onnx.save(model, path)

    monkeypatch.setattr(allaprima.export.checkpoint, "write_graph", write_graph)
    for place in (target, tmp_path / "new"):
        with pytest.raises(ExportError, match=r"denoiser in fp32 is off by .* in next_sample at"):
            export_checkpoint(str(tiny_checkpoint), place, precision="fp32", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert open_bundle(target, verify=True).manifest.name == "old"
