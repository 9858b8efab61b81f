"""Kandinsky's checkpoints at real size with random weights; `benchmarks.checkpoints` is the command."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from allaprima.benchmarks.checkpoints import TEXT_ENCODER_2, write_clip_tokenizer, write_model

_MOVQ: dict[str, Any] = {
    "latent_channels": 4,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 16384,
    "layers_per_block": 2,
    "norm_type": "spatial",
    "down_block_types": ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
}
_IMAGE_ENCODER: dict[str, Any] = {
    "hidden_size": 1664,
    "intermediate_size": 8192,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "patch_size": 14,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_PRIOR: dict[str, Any] = {"embedding_dim": 1280, "num_embeddings": 77, "additional_embeddings": 4}
_UNET: dict[str, Any] = {
    "sample_size": 64,
    "out_channels": 8,
    "block_out_channels": (384, 768, 1152, 1536),
    "layers_per_block": 3,
    "down_block_types": ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
    "attention_head_dim": 64,
    "cross_attention_dim": 768,
    "encoder_hid_dim": 1280,
    "encoder_hid_dim_type": "image_proj",
    "addition_embed_type": "image",
    "addition_embed_type_num_heads": 64,
    "resnet_time_scale_shift": "scale_shift",
}
"""The configurations of Kandinsky 2.2, where they differ from their classes' defaults."""
_FLAN_UL2: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 256,
    "d_ff": 16384,
    "num_layers": 32,
    "num_heads": 16,
    "feed_forward_proj": "gated-silu",
}
"""The text encoder of Kandinsky 3, whose UNet is the default of its class."""


def write_prior(folder: Path, *, seed: int = 0) -> None:
    """A diffusers folder with the networks of Kandinsky 2.2's prior; as `checkpoints.write_sd15` else."""
    import diffusers
    import transformers

    write_clip_tokenizer(folder / "tokenizer")
    transformers.CLIPImageProcessor().save_pretrained(folder / "image_processor")
    text = transformers.CLIPTextConfig(**TEXT_ENCODER_2)
    vision = transformers.CLIPVisionConfig(**_IMAGE_ENCODER)
    write_model(folder / "text_encoder", seed, lambda: transformers.CLIPTextModelWithProjection(text))
    write_model(
        folder / "image_encoder", seed + 1, lambda: transformers.CLIPVisionModelWithProjection(vision)
    )
    write_model(folder / "prior", seed + 2, lambda: diffusers.PriorTransformer(**_PRIOR))
    diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", clip_sample_range=10.0, prediction_type="sample"
    ).save_pretrained(folder / "scheduler")
    kinds = {
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "image_processor": ["transformers", "CLIPImageProcessor"],
        "prior": ["diffusers", "PriorTransformer"],
        "scheduler": ["diffusers", "UnCLIPScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    _write_index(folder, "KandinskyV22PriorPipeline", kinds)


def write_decoder(folder: Path, *, seed: int = 0) -> None:
    """As `write_prior`, the decoder of Kandinsky 2.2."""
    import diffusers

    movq = {**_MOVQ, "block_out_channels": (128, 256, 256, 512)}
    write_model(folder / "unet", seed, lambda: diffusers.UNet2DConditionModel(**_UNET))
    write_model(folder / "movq", seed + 1, lambda: diffusers.VQModel(**movq))
    diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False
    ).save_pretrained(folder / "scheduler")
    kinds = {
        "movq": ["diffusers", "VQModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    _write_index(folder, "KandinskyV22Pipeline", kinds)


def write_kandinsky3(folder: Path, *, seed: int = 0) -> None:
    """As `write_prior`, Kandinsky 3; the tokenizer knows single letters only."""
    import diffusers
    import transformers

    letters = [("▁", -2.0), *((letter, -3.0) for letter in string.printable.strip())]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    transformers.T5Tokenizer(vocab=[*special, *letters]).save_pretrained(folder / "tokenizer")
    text = transformers.T5Config(**_FLAN_UL2)
    movq = {**_MOVQ, "block_out_channels": (256, 512, 512, 1024)}
    write_model(folder / "text_encoder", seed, lambda: transformers.T5EncoderModel(text))
    write_model(folder / "unet", seed + 1, diffusers.Kandinsky3UNet)
    write_model(folder / "movq", seed + 2, lambda: diffusers.VQModel(**movq))
    diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="squaredcos_cap_v2", steps_offset=1
    ).save_pretrained(folder / "scheduler")
    kinds = {
        "movq": ["diffusers", "VQModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "unet": ["diffusers", "Kandinsky3UNet"],
    }
    _write_index(folder, "Kandinsky3Pipeline", kinds)


def _write_index(folder: Path, pipeline: str, kinds: dict[str, list[str]]) -> None:
    """Last, so that a folder which was interrupted is no checkpoint."""
    index = {"_class_name": pipeline, **kinds}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
