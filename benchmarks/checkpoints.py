"""Checkpoints of real size where no weights can be had: what speed and memory depend on, with random weights.

```
python -m allaprima.benchmarks.checkpoints build/benchmarks/sd15-random
python -m allaprima.benchmarks.checkpoints build/benchmarks/sdxl-random --model sdxl
python -m allaprima.benchmarks.checkpoints build/benchmarks/kandinsky22-random --model kandinsky22
python -m allaprima.benchmarks.checkpoints build/benchmarks/kandinsky22-prior-random --model kandinsky22-prior
python -m allaprima.benchmarks.checkpoints build/benchmarks/kandinsky3-random --model kandinsky3
```
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHARD = 5_000_000_000
"""Bytes of a file of weights, at most."""
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


SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TEXT_ENCODER_2: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
SDXL_SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
"""The configurations of SDXL 1.0; its first text encoder and its VAE are near those above."""


UNSCALED = "SelfAttention.q.weight"
"""What the queries' weights are called where scores are not scaled, as in T5. They are as small as it draws
them itself, since attention that hangs on one token alone makes a deep model chaotic."""


def write_sd15(folder: Path, *, seed: int = 0) -> None:
    """Write a diffusers folder with the networks of Stable Diffusion 1.5 and distinct random weights in fp16.

    The tokenizer is that of `shapes`, since CLIP's cannot be made up: it uses only the first of the 49,408
    embeddings, which changes no shape and no time. The same seed gives the same weights. One tensor at
    a time is in memory; model_index.json comes last, so an interrupted folder is no checkpoint.
    """
    import diffusers
    import transformers

    write_clip_tokenizer(folder / "tokenizer")
    text = transformers.CLIPTextConfig(**TEXT_ENCODER)
    write_model(folder / "text_encoder", seed, lambda: transformers.CLIPTextModel(text))
    write_model(folder / "unet", seed + 1, lambda: diffusers.UNet2DConditionModel(**UNET))
    write_model(folder / "vae", seed + 2, lambda: diffusers.AutoencoderKL(**VAE))
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


def write_sdxl(folder: Path, *, seed: int = 0) -> None:
    """As `write_sd15`, with the networks of SDXL 1.0; the second tokenizer pads with its token 0."""
    import diffusers
    import transformers

    write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    first, second = (transformers.CLIPTextConfig(**one) for one in (TEXT_ENCODER, TEXT_ENCODER_2))
    write_model(folder / "text_encoder", seed, lambda: transformers.CLIPTextModel(first))
    write_model(folder / "text_encoder_2", seed + 1, lambda: transformers.CLIPTextModelWithProjection(second))
    write_model(folder / "unet", seed + 2, lambda: diffusers.UNet2DConditionModel(**SDXL_UNET))
    vae = VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
    write_model(folder / "vae", seed + 3, lambda: diffusers.AutoencoderKL(**vae))
    diffusers.EulerDiscreteScheduler(**SDXL_SCHEDULER).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_clip_tokenizer(folder: Path, pad: str | None = None) -> None:
    """The tokenizer of `shapes`, padding with its end or with `pad`."""
    if pad is None:
        shutil.copytree(SHAPES / "tokenizer", folder, dirs_exist_ok=True)
        return
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(SHAPES / "tokenizer", pad_token=pad).save_pretrained(folder)


def write_model(folder: Path, seed: int, make: Callable[[], Any]) -> None:
    """The model's configuration, and random weights under the names and in the shapes of its own.

    Weights of more than `SHARD` bytes are in several files with an index, as published ones are.
    """
    import torch

    from allaprima.export.loading import DIFFUSERS, TRANSFORMERS

    with torch.device("meta"):
        model = make().half()
    random = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        tied = any(weight is other for other in weights.values())
        if weight.is_floating_point() and not tied:
            weights[name] = weight
    folder.mkdir(parents=True, exist_ok=True)
    diffusers_own = hasattr(model, "save_config")
    (model.save_config if diffusers_own else model.config.save_pretrained)(folder)
    _write_shards(weights, folder / (DIFFUSERS if diffusers_own else TRANSFORMERS), random)


def _write_shards(weights: dict[str, torch.Tensor], path: Path, random: torch.Generator) -> None:
    from allaprima.export.weights import write_weights

    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, weight in weights.items():
        if size + weight.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size, total = size + weight.nbytes, total + weight.nbytes
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        numbered = f"{path.stem}-{number:05}-of-{len(shards):05}{path.suffix}"
        file = path.name if len(shards) == 1 else numbered
        write_weights(shard, path.with_name(file), lambda name: _draw(name, weights[name].shape, random))
        places |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        path.with_name(f"{path.name}.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _draw(name: str, shape: torch.Size, random: torch.Generator) -> torch.Tensor:
    """Values that keep activations small, and no two tensors equal, which an exporter may merge."""
    import torch

    if len(shape) > 1:
        bound = (shape[0] / shape.numel()) ** 0.5  # of the number of inputs, as torch's layers have it
        if name.endswith(UNSCALED):
            bound /= 16
        return torch.empty(shape).uniform_(-bound, bound, generator=random).half()
    values = 0.02 * torch.randn(shape, generator=random)
    return (values + 1 if name.endswith("weight") else values).half()


def _writers() -> dict[str, Callable[..., None]]:
    from allaprima.benchmarks import kandinsky

    return {
        "sd15": write_sd15,
        "sdxl": write_sdxl,
        "kandinsky22": kandinsky.write_decoder,
        "kandinsky22-prior": kandinsky.write_prior,
        "kandinsky3": kandinsky.write_kandinsky3,
    }


def main() -> None:
    """The command line."""
    writers = _writers()
    parser = argparse.ArgumentParser(
        prog="python -m allaprima.benchmarks.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="the folder to write: 2.1 GB, SDXL 6.9 GB, Kandinsky 2.2 2.6 and 7.1 GB, 3 24 GB",
    )
    parser.add_argument("--model", choices=writers, default="sd15")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    writers[options.model](options.folder, seed=options.seed)


if __name__ == "__main__":
    main()
