"""Single-file checkpoints in the original layout of Stable Diffusion: unpacked to a diffusers folder.

The file holds weights alone. What the networks look like is read off the shapes of their tensors; what no
shape tells (number of heads, activation, noise schedule) belongs to the family: the text encoder's width says
which. diffusers maps the names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from allaprima.bundle import ExportError
from allaprima.export.reason import reason

Weights = Mapping[str, torch.Tensor]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
HUB_TOKENIZER = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Release:
    """What a family of releases has in common and no tensor tells. `heads` 0: 64 channels each."""

    heads: int
    activation: str
    pad: str
    prediction: str
    size: int
    scheduler: Mapping[str, Any]


_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
FIRST = Release(
    *(8, "quick_gelu", "<|endoftext|>", "epsilon", 64),
    {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **_SCHEDULE},
)
SECOND = Release(
    *(0, "gelu", "!", "v_prediction", 96),
    {"_class_name": "DDIMScheduler", "clip_sample": False, **_SCHEDULE},
)


@dataclass(frozen=True)
class SingleFile:
    """What the one who exports a single file says about it.

    Args:
        tokenizer: a folder or hub id with CLIP's vocabulary, which the file lacks; None is CLIP's on the hub.
        prediction: "epsilon" or "v_prediction"; None is the family's: v prediction for 2.x.
        allow_pickle: open a `.ckpt`, which could hold code, with torch's loader for weights alone.
    """

    tokenizer: str | None = None
    prediction: str | None = None
    allow_pickle: bool = False


def unpack(file: Path, folder: Path, about: SingleFile) -> None:
    """Write the diffusers folder of a file of Stable Diffusion 1.x or 2.x.

    The averaged (EMA) weights are taken if it has them. On an error what is in the folder is worth nothing.

    Raises:
        ExportError: it is no such checkpoint, another family's, or has tensors missing or too many.
    """
    weights = read_weights(file, pickle=about.allow_pickle)
    release = _release(file, weights)
    parts = {
        "unet": (_unet(weights, release), _map_unet),
        "vae": (_vae(weights), _map_vae),
        "text_encoder": (_text_encoder(weights, release), _map_text_encoder),
    }
    for part, (config, rename) in parts.items():
        try:
            tensors = rename(weights, config)
        except Exception as cause:
            raise ExportError(
                f"'{file}': the tensors of the {part} are not usable: {reason(cause)}"
            ) from cause
        _check(file, part, config, tensors)
        _write_part(folder / part, config, tensors)
    scheduler = {**release.scheduler, "prediction_type": about.prediction or release.prediction}
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_tokenizer(about.tokenizer, release, folder / "tokenizer")
    _write_json(folder / "model_index.json", _index(scheduler["_class_name"]))


def read_weights(file: Path, *, pickle: bool) -> Weights:
    """All tensors of a file by name, mapped from disk where the format allows. Raises ExportError."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except Exception as cause:
            raise ExportError(f"'{file}' cannot be read as safetensors: {reason(cause)}") from cause
    if file.suffix not in (".ckpt", ".pt", ".pth"):
        raise ExportError(f"'{file}' is neither a .safetensors nor a .ckpt file")
    if not pickle:
        raise ExportError(
            f"'{file}' is a pickle, a format that can carry code: get the .safetensors of the same model, "
            "or, if you trust where it comes from, add --allow-pickle, which reads tensors and nothing else"
        )
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as cause:
        raise ExportError(
            f"'{file}' holds more than tensors, or is damaged, and was not opened: {reason(cause)}"
        ) from cause
    while isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise ExportError(f"'{file}' holds no tensors by name")
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _release(file: Path, weights: Weights) -> Release:
    if f"{UNET}input_blocks.0.0.weight" not in weights:
        raise ExportError(
            f"'{file}' is not a checkpoint of Stable Diffusion 1.x or 2.x: "
            f"it has no {UNET}input_blocks.0.0.weight"
        )
    if any(name.startswith("conditioner.") for name in weights):
        raise ExportError(
            f"'{file}' is a checkpoint of SDXL: this version exports Stable Diffusion 1.x and 2.x"
        )
    if any(name.startswith(CLIP) for name in weights):
        return FIRST
    if any(name.startswith(OPEN_CLIP) for name in weights):
        return SECOND
    raise ExportError(f"'{file}' has no text encoder ({CLIP}* or {OPEN_CLIP}*): it is incomplete")


def _shape(weights: Weights, name: str) -> torch.Size:
    if name not in weights:
        raise ExportError(f"the checkpoint lacks the tensor {name}")
    return weights[name].shape


def _numbers(weights: Weights, pattern: str) -> list[int]:
    """The different numbers in place of the group of a pattern, in order."""
    found = {int(match[1]) for name in weights if (match := re.match(pattern, name))}
    return sorted(found)


def _unet(weights: Weights, release: Release) -> dict[str, Any]:
    prefix = re.escape(UNET)
    channels: list[int] = []
    layers: list[int] = []
    attends: list[bool] = []
    fresh = True
    for index in _numbers(weights, rf"{prefix}input_blocks\.(\d+)\.")[1:]:
        block = f"{UNET}input_blocks.{index}."
        if f"{block}0.op.weight" in weights:
            fresh = True
            continue
        if fresh:
            channels.append(_shape(weights, f"{block}0.in_layers.2.weight")[0])
            layers.append(0)
            attends.append(any(name.startswith(f"{block}1.") for name in weights))
            fresh = False
        layers[-1] += 1
    keys = [name for name in weights if name.startswith(UNET) and name.endswith("attn2.to_k.weight")]
    if not channels or not keys:
        raise ExportError("the checkpoint's UNet has no levels, or none that attends to text")
    first = keys[0].partition(".transformer_blocks.")[0]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": release.size,
        "in_channels": _shape(weights, f"{UNET}input_blocks.0.0.weight")[1],
        "out_channels": _shape(weights, f"{UNET}out.2.weight")[0],
        "block_out_channels": channels,
        "layers_per_block": layers[0],
        "down_block_types": ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)],
        "cross_attention_dim": weights[keys[0]].shape[1],
        "attention_head_dim": release.heads or [max(1, each // 64) for each in channels],
        "use_linear_projection": len(_shape(weights, f"{first}.proj_in.weight")) == 2,
        "norm_num_groups": 32,
    }


def _vae(weights: Weights) -> dict[str, Any]:
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
        "scaling_factor": 0.18215,
        "sample_size": 512,
        "norm_num_groups": 32,
    }


def _text_encoder(weights: Weights, release: Release) -> dict[str, Any]:
    if release is FIRST:
        words, places = (
            f"{CLIP}embeddings.token_embedding.weight",
            f"{CLIP}embeddings.position_embedding.weight",
        )
        layer, inner = f"{CLIP}encoder.layers.", f"{CLIP}encoder.layers.0.mlp.fc1.weight"
        layers = len(_numbers(weights, rf"{re.escape(layer)}(\d+)\."))
    else:  # the last layer of this encoder is not used, as Stable Diffusion 2 was trained
        words, places = f"{OPEN_CLIP}token_embedding.weight", f"{OPEN_CLIP}positional_embedding"
        layer, inner = (
            f"{OPEN_CLIP}transformer.resblocks.",
            f"{OPEN_CLIP}transformer.resblocks.0.mlp.c_fc.weight",
        )
        layers = len(_numbers(weights, rf"{re.escape(layer)}(\d+)\.")) - 1
    vocabulary, width = _shape(weights, words)
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(weights, inner)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": _shape(weights, places)[0],
        "hidden_act": release.activation,
        "projection_dim": width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1 if release is FIRST else 0,
    }


def _map_unet(weights: Weights, config: Mapping[str, Any]) -> Weights:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    averaged = sum(name.startswith("model_ema.") for name in weights) > 100
    mapped: Weights = convert_ldm_unet_checkpoint(dict(weights), dict(config), extract_ema=averaged)
    return mapped


def _map_vae(weights: Weights, config: Mapping[str, Any]) -> Weights:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    mapped: Weights = convert_ldm_vae_checkpoint(dict(weights), dict(config))
    return mapped


def _map_text_encoder(weights: Weights, config: Mapping[str, Any]) -> Weights:
    from diffusers.loaders import single_file_utils as maps

    model = _empty("text_encoder", config)
    if any(name.startswith(CLIP) for name in weights):
        mapped = maps.convert_ldm_clip_checkpoint(dict(weights))
    else:
        mapped = maps.convert_open_clip_checkpoint(model, dict(weights), prefix=OPEN_CLIP)
    # Since transformers 5 the model's own names have no such prefix.
    prefix = "" if any(name.startswith("text_model.") for name in model.state_dict()) else "text_model."
    unused = f"encoder.layers.{config['num_hidden_layers']}."
    named = {name.removeprefix(prefix): value for name, value in mapped.items()}
    return {name: value for name, value in named.items() if unused not in name}


def _empty(part: str, config: Mapping[str, Any]) -> Any:
    """The model of a part without memory for its weights."""
    import diffusers
    import transformers

    with torch.device("meta"):
        if part == "text_encoder":
            return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
        return getattr(diffusers, config["_class_name"]).from_config(dict(config))


def _check(file: Path, part: str, config: Mapping[str, Any], tensors: Weights) -> None:
    """ExportError unless the tensors are just those of the model."""
    wanted = {name: value.shape for name, value in _empty(part, config).state_dict().items()}
    found = {name: value.shape for name, value in tensors.items() if not name.endswith("position_ids")}
    wanted = {name: shape for name, shape in wanted.items() if not name.endswith("position_ids")}
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    misshapen = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    for names, what in ((missing, "lacks"), (extra, "has too many:"), (misshapen, "has of another shape")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ExportError(f"'{file}': the {part} {what} {', '.join(names[:3])}{more}")


def _write_part(folder: Path, config: Mapping[str, Any], tensors: Weights) -> None:
    name = "model" if "architectures" in config else "diffusion_pytorch_model"
    folder.mkdir(parents=True)
    kept = {key: value.contiguous() for key, value in tensors.items() if not key.endswith("position_ids")}
    save_file(kept, folder / f"{name}.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)


def _write_tokenizer(source: str | None, release: Release, folder: Path) -> None:
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(source or HUB_TOKENIZER, pad_token=release.pad)
    except Exception as cause:
        raise ExportError(
            f"a single file has no vocabulary, and that of '{source or HUB_TOKENIZER}' cannot be loaded "
            f"({type(cause).__name__}): name a folder with CLIP's tokenizer, --tokenizer"
        ) from cause
    tokenizer.save_pretrained(folder)


def _index(scheduler: str) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
