"""The configurations of a single file's networks, read off the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from allaprima.bundle import ExportError
from allaprima.export.layouts import UNET, VAE, Release, Text, Weights

TIME_ID = 256
"""Each number of SDXL's `time_ids` becomes a sinusoid of this width."""


def read_unet(weights: Weights, release: Release) -> dict[str, Any]:
    """The UNet's configuration; ExportError if a tensor that tells it is missing."""
    levels = _read_levels(weights)
    keys = [name for name in weights if name.startswith(UNET) and name.endswith("attn2.to_k.weight")]
    if not levels or not keys:
        raise ExportError("the checkpoint's UNet has no levels, or none that attends to text")
    first = keys[0].partition(".transformer_blocks.")[0]
    channels, attends = [level.channels for level in levels], [level.depth > 0 for level in levels]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": release.size,
        "in_channels": _shape(weights, f"{UNET}input_blocks.0.0.weight")[1],
        "out_channels": _shape(weights, f"{UNET}out.2.weight")[0],
        "block_out_channels": channels,
        "layers_per_block": levels[0].layers,
        "down_block_types": ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)],
        "transformer_layers_per_block": _depths(weights, levels),
        "cross_attention_dim": weights[keys[0]].shape[1],
        "attention_head_dim": release.heads or [max(1, each // 64) for each in channels],
        "use_linear_projection": len(_shape(weights, f"{first}.proj_in.weight")) == 2,
        "norm_num_groups": 32,
        **(_read_addition(weights) if release.time_ids else {}),
    }


@dataclass
class _Level:
    channels: int
    layers: int
    depth: int
    """Transformer blocks after each layer."""


def _read_levels(weights: Weights) -> list[_Level]:
    levels: list[_Level] = []
    fresh = True
    for index in _numbers(weights, rf"{re.escape(UNET)}input_blocks\.(\d+)\.")[1:]:
        block = f"{UNET}input_blocks.{index}."
        if f"{block}0.op.weight" in weights:
            fresh = True
            continue
        if fresh:
            channels = _shape(weights, f"{block}0.in_layers.2.weight")[0]
            levels.append(_Level(channels, layers=0, depth=_depth(weights, f"{block}1.")))
            fresh = False
        levels[-1].layers += 1
    return levels


def _depth(weights: Weights, block: str) -> int:
    return len(_numbers(weights, rf"{re.escape(block)}transformer_blocks\.(\d+)\."))


def _depths(weights: Weights, levels: list[_Level]) -> int | list[int]:
    """Transformer blocks per level; one number if all agree. The middle takes the last level's number."""
    middle = _depth(weights, f"{UNET}middle_block.1.")
    found = {level.depth for level in levels if level.depth} | {middle}
    if len(found) == 1:
        return middle
    depths = [level.depth or 1 for level in levels]
    return depths if levels[-1].depth else [*depths[:-1], middle]


def _read_addition(weights: Weights) -> dict[str, Any]:
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_ID,
        "projection_class_embeddings_input_dim": _shape(weights, f"{UNET}label_emb.0.0.weight")[1],
    }


def read_vae(weights: Weights, release: Release) -> dict[str, Any]:
    """The autoencoder's configuration; ExportError if a tensor that tells it is missing."""
    down = f"{VAE}encoder.down"
    levels = _numbers(weights, rf"{re.escape(down)}\.(\d+)\.")
    channels = [_shape(weights, f"{down}.{level}.block.0.conv1.weight")[0] for level in levels]
    if not channels:
        raise ExportError(f"the checkpoint has no autoencoder ({VAE}*): it is incomplete")
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": channels,
        "layers_per_block": len(_numbers(weights, rf"{re.escape(down)}\.0\.block\.(\d+)\.")),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "latent_channels": _shape(weights, f"{VAE}decoder.conv_in.weight")[1],
        "scaling_factor": release.scaling,
        "sample_size": 8 * release.size,
        "norm_num_groups": 32,
        **release.vae,
    }


def read_text(tensors: Weights, text: Text) -> dict[str, Any]:
    """A text encoder's configuration, from tensors under the model's own names without `text_model.`.

    Raises:
        ExportError: a tensor that tells it is missing.
    """
    vocabulary, width = _shape(tensors, "embeddings.token_embedding.weight")
    projection = _shape(tensors, "text_projection.weight")[0] if text.pooled else width
    return {
        "architectures": [text.kind],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(tensors, "encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": len(_numbers(tensors, r"encoder\.layers\.(\d+)\.")),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": _shape(tensors, "embeddings.position_embedding.weight")[0],
        "hidden_act": "gelu" if text.open_clip else "quick_gelu",
        "projection_dim": projection,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0 if text.open_clip else vocabulary - 1,
    }


def check_addition(unet: Mapping[str, Any], pooled: int, release: Release) -> None:
    """ExportError unless the UNet takes the pooled vector, `pooled` wide, and the release's time_ids."""
    taken = unet.get("projection_class_embeddings_input_dim")
    if taken is not None and taken != pooled + release.time_ids * TIME_ID:
        raise ExportError(
            f"the UNet's label_emb takes {taken} numbers, not the {pooled} of the pooled prompt and "
            f"{TIME_ID} each for {release.time_ids} others: such models are not supported"
        )


def _shape(weights: Weights, name: str) -> torch.Size:
    if name not in weights:
        raise ExportError(f"the checkpoint lacks the tensor {name}")
    return weights[name].shape


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    """The different numbers in place of the group of a pattern, in order."""
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    return sorted(found)
