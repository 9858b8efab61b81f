"""The recipe of random checkpoints, on networks small enough for a test."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file

from allaprima.benchmarks import checkpoints
from allaprima.export.source import open_checkpoint
from allaprima.export.stable_diffusion import read_family

SMALL: dict[str, dict[str, Any]] = {
    "TEXT_ENCODER": {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 1000},
    "UNET": {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 48, "layers_per_block": 1},
    "SDXL_UNET": {
        "block_out_channels": (32, 32, 32),
        "attention_head_dim": (2, 2, 2),
        "cross_attention_dim": 80,
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 1),
        "projection_class_embeddings_input_dim": 24 + 6 * 256,
    },
    "TEXT_ENCODER_2": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 1000,
        "projection_dim": 24,
    },
    "VAE": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fields in SMALL.items():
        monkeypatch.setattr(checkpoints, name, {**getattr(checkpoints, name), **fields})


@pytest.mark.usefixtures("small")
def test_a_checkpoint_is_whole_in_half_precision_and_of_distinct_weights(tmp_path: Path) -> None:
    checkpoints.write_sd15(tmp_path / "a")
    checkpoints.write_sd15(tmp_path / "b")
    family = read_family(open_checkpoint(str(tmp_path / "a")))
    assert (family.latent.channels, family.latent.downscale, family.latent.multiple) == (4, 8, 64)
    assert family.scheduler["_class_name"] == "PNDMScheduler"
    for file in sorted((tmp_path / "a").rglob("*.safetensors")):
        weights = load_file(file)
        again = load_file(tmp_path / "b" / file.relative_to(tmp_path / "a"))
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        assert {weight.dtype for weight in weights.values()} == {torch.float16}
        assert all(torch.isfinite(weight).all() for weight in weights.values())
        contents = {weight.numpy().tobytes() for weight in weights.values()}
        assert len(contents) == len(weights)


@pytest.mark.usefixtures("small")
def test_sdxl(tmp_path: Path) -> None:
    checkpoints.write_sdxl(tmp_path / "a")
    checkpoint = open_checkpoint(str(tmp_path / "a"))
    family = read_family(checkpoint)
    assert (family.latent.channels, family.latent.downscale, family.latent.multiple) == (4, 8, 32)
    assert family.scheduler["_class_name"] == "EulerDiscreteScheduler"
    assert family.zero_negative
    assert family.overflows("vae_decoder")
    assert [text.width for text in family.texts.values()] == [48, 32]
    assert [text.tokenizer.pad for text in family.texts.values()] == [766, 0]
    for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
        weights = checkpoint.load(part, torch.float16).state_dict()
        assert all(torch.isfinite(weight).all() for weight in weights.values())
        assert len({(weight + 0).numpy().tobytes() for weight in weights.values()}) == len(weights)


def test_the_real_size_has_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**checkpoints.UNET)
        large = diffusers.UNet2DConditionModel(**checkpoints.SDXL_UNET)
        text = transformers.CLIPTextConfig(**checkpoints.TEXT_ENCODER_2)
        encoder = transformers.CLIPTextModelWithProjection(text)
        vae = diffusers.AutoencoderKL(**checkpoints.VAE)
    assert sum(weight.numel() for weight in unet.parameters()) == 859_520_964
    assert sum(weight.numel() for weight in vae.parameters()) == 83_653_863
    assert sum(weight.numel() for weight in large.parameters()) == 2_567_463_684
    assert sum(weight.numel() for weight in encoder.parameters()) == 694_659_840
