"""Models whose weights stay on disk are those that the libraries load."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from allaprima.bundle import ExportError
from allaprima.export.loading import DIFFUSERS, TRANSFORMERS, load_model
from allaprima.export.weights import StoredTensor

PARTS: dict[str, tuple[Any, str]] = {
    "text_encoder": (CLIPTextModel, TRANSFORMERS),
    "unet": (UNet2DConditionModel, DIFFUSERS),
    "vae": (AutoencoderKL, DIFFUSERS),
}


def same(got: torch.nn.Module, wanted: torch.nn.Module) -> bool:
    """In names, dtypes and values, buffers that no file holds among them."""
    ours, theirs = ({**dict(one.named_buffers()), **one.state_dict()} for one in (got, wanted))
    assert ours.keys() == theirs.keys()
    return all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def split(folder: Path, name: str) -> None:
    """One file of weights into three with an index, as for a large model."""
    weights = load_file(folder / name)
    shards = [f"{name.partition('.')[0]}-0000{k}-of-00003.safetensors" for k in range(3)]
    places = {key: shards[k % 3] for k, key in enumerate(sorted(weights))}
    for shard in shards:
        save_file({key: weights[key] for key, place in places.items() if place == shard}, folder / shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / name).unlink()


@pytest.mark.parametrize("part", PARTS)
def test_as_the_library_loads_it(copy: Path, part: str) -> None:
    kind, name = PARTS[part]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        got = load_model(kind, copy / part, dtype)
        assert all(isinstance(weight, StoredTensor) for weight in got.parameters())
        assert same(got, kind.from_pretrained(copy / part, dtype=dtype))
    split(copy / part, name)
    again = load_model(kind, copy / part, torch.float16)
    assert same(again, load_model(kind, copy / part, torch.float16))
    assert same(again, kind.from_pretrained(copy / part, dtype=torch.float16))


def test_old_names_of_an_autoencoder(copy: Path) -> None:
    wanted = load_model(AutoencoderKL, copy / "vae", torch.float32)
    weights = load_file(copy / "vae" / DIFFUSERS)
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        for name in [name for name in weights if f".{new}." in name]:
            weights[name.replace(f".{new}.", f".{old}.")] = weights.pop(name)
    assert any("query" in name for name in weights)
    expected = {name: value.clone() for name, value in wanted.state_dict().items()}
    save_file(weights, copy / "vae" / DIFFUSERS)
    got = load_model(AutoencoderKL, copy / "vae", torch.float32).state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_tied_weights_and_those_that_stay_wide(tmp_path: Path) -> None:
    """T5 shares its embedding, and keeps one layer in float32 where the rest is fp16."""
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        got = load_model(T5EncoderModel, tmp_path, dtype)
        assert same(got, T5EncoderModel.from_pretrained(tmp_path, dtype=dtype))
        assert got.shared.weight is got.encoder.embed_tokens.weight  # type: ignore[union-attr]
    half = load_model(T5EncoderModel, tmp_path, torch.float16)
    dtypes = {name: weight.dtype for name, weight in half.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".wo." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".wo." not in name} == {torch.float16}


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_missing(copy: Path, part: str) -> None:
    """Not random ones in their place."""
    kind, name = PARTS[part]
    weights = load_file(copy / part / name)
    dropped = sorted(weights)[3]
    save_file({key: value for key, value in weights.items() if key != dropped}, copy / part / name)
    with pytest.raises(ExportError, match=rf"it lacks {dropped.removeprefix('text_model.')};"):
        load_model(kind, copy / part, torch.float32)


@pytest.mark.parametrize("part", PARTS)
def test_weights_of_another_shape(copy: Path, part: str) -> None:
    kind, name = PARTS[part]
    weights = load_file(copy / part / name)
    first = sorted(weights)[0]
    save_file({**weights, first: torch.zeros(3, 5, 7)}, copy / part / name)
    with pytest.raises(Exception, match=r"size|shape|mismatch"):
        load_model(kind, copy / part, torch.float32)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not usable"),
        ("[]", "not usable"),
        ('{"weight_map": 3}', "not usable"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "no file beside it"),
        ('{"weight_map": {"a": 3}}', "no file beside it"),
        ('{"weight_map": {"a": "missing.safetensors"}}', "cannot be read as safetensors"),
    ],
)
def test_broken_indices(copy: Path, text: str, why: str) -> None:
    (copy / "unet" / DIFFUSERS).unlink()
    (copy / "unet" / f"{DIFFUSERS}.index.json").write_text(text)
    with pytest.raises(ExportError, match=why):
        load_model(UNet2DConditionModel, copy / "unet", torch.float32)
