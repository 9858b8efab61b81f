"""The recipe of random checkpoints, on networks small enough for a test."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file

from allaprima.benchmarks import checkpoints, kandinsky
from allaprima.export.kandinsky import read_family as read_kandinsky
from allaprima.export.kandinsky3 import read_family as read_kandinsky3
from allaprima.export.source import Checkpoint, open_checkpoint
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


SMALL_KANDINSKY: dict[str, dict[str, Any]] = {
    "_IMAGE_ENCODER": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "projection_dim": 32,
    },
    "_PRIOR": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "embedding_dim": 32},
    "_UNET": {
        "block_out_channels": (32, 64, 64, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "encoder_hid_dim": 32,
        "addition_embed_type_num_heads": 2,
    },
    "_MOVQ": {"layers_per_block": 1, "num_vq_embeddings": 16},
    "TEXT_ENCODER_2": {**SMALL["TEXT_ENCODER_2"], "projection_dim": 32},
    "_FLAN_UL2": {"d_model": 64, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 500},
}


@pytest.fixture
def small_kandinsky(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fields in SMALL_KANDINSKY.items():
        monkeypatch.setattr(kandinsky, name, {**getattr(kandinsky, name), **fields})
    monkeypatch.setattr(checkpoints, "SHARD", 100_000)


def check_weights(checkpoint: Checkpoint, parts: Sequence[str]) -> None:
    for part in parts:
        weights = checkpoint.load(part, torch.float16).state_dict()
        assert all(torch.isfinite(weight).all() for weight in weights.values())


@pytest.mark.usefixtures("small_kandinsky")
def test_kandinsky_22_is_two_folders_that_belong_together(tmp_path: Path) -> None:
    kandinsky.write_prior(tmp_path / "prior")
    kandinsky.write_decoder(tmp_path / "decoder")
    decoder, prior = (open_checkpoint(str(tmp_path / name)) for name in ("decoder", "prior"))
    family = read_kandinsky(decoder, prior)
    assert (family.embedding, family.latent.channels, family.latent.downscale) == (32, 4, 8)
    check_weights(decoder, ("unet", "movq"))
    check_weights(prior, ("prior", "text_encoder", "image_encoder"))


@pytest.mark.usefixtures("small_kandinsky")
def test_kandinsky_3_is_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = diffusers.Kandinsky3UNet
    small = {"groups": 4, "block_out_channels": (32, 64), "cross_attention_dim": 64, "encoder_hid_dim": 64}
    monkeypatch.setattr(diffusers, "Kandinsky3UNet", lambda: unet(time_embedding_dim=64, **small))
    kandinsky.write_kandinsky3(tmp_path)
    monkeypatch.undo()
    checkpoint = open_checkpoint(str(tmp_path))
    family = read_kandinsky3(checkpoint)
    assert (family.texts["text_encoder"].width, family.length) == (64, 128)
    check_weights(checkpoint, ("text_encoder", "unet", "movq"))
    shards = sorted((tmp_path / "text_encoder").glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    assert sum(shard.stat().st_size for shard in shards[:-1]) <= 105_000 * len(shards)
    names = [name for shard in shards for name in load_file(shard)]
    assert len(names) == len(set(names))
    assert "shared.weight" in names
    assert "encoder.embed_tokens.weight" not in names  # tied


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


def test_kandinsky_has_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        movq = diffusers.VQModel(**kandinsky._MOVQ, block_out_channels=(128, 256, 256, 512))
        larger = diffusers.VQModel(**kandinsky._MOVQ, block_out_channels=(256, 512, 512, 1024))
        models = {
            67_832_495: movq,
            270_669_103: larger,
            1_026_225_920: diffusers.PriorTransformer(**kandinsky._PRIOR),
            1_253_057_288: diffusers.UNet2DConditionModel(**kandinsky._UNET),
            1_844_907_264: transformers.CLIPVisionModelWithProjection(
                transformers.CLIPVisionConfig(**kandinsky._IMAGE_ENCODER)
            ),
            3_055_348_228: diffusers.Kandinsky3UNet(),
            8_721_797_632: transformers.T5EncoderModel(transformers.T5Config(**kandinsky._FLAN_UL2)),
        }
    for count, model in models.items():
        assert sum(weight.numel() for weight in model.parameters()) == count
