"""Checkpoints and their exports. An export takes most of a minute, so the whole run shares each of them."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from allaprima.bundle import Bundle
from allaprima.export import export_checkpoint

SHAPES = Path(__file__).parents[2] / "models" / "shapes" / "checkpoint"


def write_tiny(folder: Path) -> Path:
    """A Stable Diffusion checkpoint with tiny networks and distinct random weights."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        **ids,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=128,
    )
    for name, model in {"text_encoder": CLIPTextModel(text), "unet": unet, "vae": vae}.items():
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        model.save_pretrained(folder / name)
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    index = json.loads((SHAPES / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "scheduler": ["diffusers", "PNDMScheduler"]})
    )
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny checkpoint in float32."""
    return export_checkpoint(
        str(tiny_checkpoint), tmp_path_factory.mktemp("bundles") / "tiny", precision="fp32"
    )


@pytest.fixture(scope="session")
def tiny_half_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny checkpoint in float16."""
    return export_checkpoint(
        str(tiny_checkpoint), tmp_path_factory.mktemp("bundles") / "half", precision="fp16"
    )


@pytest.fixture(scope="session")
def shapes_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The project's own model in float32."""
    return export_checkpoint(str(SHAPES), tmp_path_factory.mktemp("bundles") / "shapes", precision="fp32")


@pytest.fixture(scope="session")
def tiny_bf16_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny checkpoint in bfloat16."""
    return export_checkpoint(
        str(tiny_checkpoint), tmp_path_factory.mktemp("bundles") / "bf16", precision="bf16"
    )
