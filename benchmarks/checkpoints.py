"""Checkpoints of real size where no weights can be had: what speed and memory depend on, with random weights.

```
python -m allaprima.benchmarks.checkpoints build/benchmarks/sd15-random
```
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).resolve().parents[1] / "models" / "shapes" / "checkpoint"
"""The checkpoint of the project's own small model."""

TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
UNET: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
VAE: dict[str, Any] = {
    "sample_size": 512,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
"""The configurations of Stable Diffusion 1.5, where they differ from their classes' defaults."""


def write_sd15(folder: Path, *, seed: int = 0) -> None:
    """Write a diffusers folder with the networks of Stable Diffusion 1.5 and distinct random weights in fp16.

    The tokenizer is that of `shapes`, since CLIP's cannot be made up: it uses only the first of the 49,408
    embeddings, which changes no shape and no time. The same seed gives the same weights. One network at
    a time is in memory; model_index.json comes last, so an interrupted folder is no checkpoint.
    """
    import diffusers
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(SHAPES / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    text = transformers.CLIPTextConfig(**TEXT_ENCODER)
    _write(folder / "text_encoder", seed, lambda: transformers.CLIPTextModel(text))
    _write(folder / "unet", seed + 1, lambda: diffusers.UNet2DConditionModel(**UNET))
    _write(folder / "vae", seed + 2, lambda: diffusers.AutoencoderKL(**VAE))
    diffusers.PNDMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(folder: Path, seed: int, make: Callable[[], Any]) -> None:
    import torch

    torch.manual_seed(seed)
    with _half(), torch.no_grad():
        model = make()
        # The classes' own initialisation keeps activations small, but leaves vectors at one or zero: an
        # exporter may merge tensors that are equal, which those of a trained model never are.
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.02 * torch.randn_like(weight))
    model.save_pretrained(folder)


@contextlib.contextmanager
def _half() -> Iterator[None]:
    """New weights in fp16 from the start, which takes half the memory of converting them."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m allaprima.benchmarks.checkpoints", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder to write, 2.1 GB")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_sd15(options.folder, seed=options.seed)


if __name__ == "__main__":
    main()
