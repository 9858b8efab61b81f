"""From the original names of tensors to those of the models; diffusers does most of it.

Every function gives views of the tensors that it takes, as far as their values allow, and an ExportError that
names the tensors it has no place for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from allaprima.bundle import ExportError
from allaprima.export.layouts import UNET, VAE, Text, Weights
from allaprima.export.weights import address

_AVERAGED = "model_ema.diffusion_model"
_TRAINING = (f"{VAE}loss.", f"{VAE}model_ema.")
"""Tensors of an autoencoder that only its training used."""
_TRANSFORMERS = re.compile(r"(?:model\.)?(?:transformer\.)?(?:text_model\.(.+)|(text_projection\.weight))")
_OPEN_CLIP = re.compile(
    r"model\.(?:transformer\.resblocks\..+|token_embedding\.weight|positional_embedding|ln_final\.\w+|text_projection)"
)
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_WITHOUT_USE = re.compile(r"(?:.*\.)?(?:logit_scale|logit_bias|attn_mask|position_ids)")


def rename_unet(weights: Weights, config: Mapping[str, Any]) -> Weights:
    """The UNet's tensors; the averaged (EMA) ones if the file has them."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    own = {name: value for name, value in weights.items() if name.startswith(UNET)}
    if any(name.startswith(_AVERAGED) for name in weights):
        own = {name: _averaged(weights, name) for name in own}
    mapped: Weights = convert_ldm_unet_checkpoint(dict(own), dict(config))
    _refuse("unet", _without_place(own, mapped))
    return mapped


def _averaged(weights: Weights, name: str) -> torch.Tensor:
    averaged = f"model_ema.{name.removeprefix('model.').replace('.', '')}"
    if averaged not in weights:
        raise ExportError(f"the checkpoint has averaged weights, but lacks {averaged}: it is incomplete")
    return weights[averaged]


def rename_vae(weights: Weights, config: Mapping[str, Any]) -> Weights:
    """The autoencoder's tensors."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    own = {
        name: value
        for name, value in weights.items()
        if name.startswith(VAE) and not name.startswith(_TRAINING)
    }
    mapped: Weights = convert_ldm_vae_checkpoint(dict(own), dict(config))
    _refuse("vae", _without_place(own, mapped))
    return mapped


def rename_text(weights: Weights, text: Text) -> Weights:
    """A text encoder's tensors, without `text_model.` before their names, and without its unused layers.

    They may have OpenCLIP's names, those of transformers, or some the ones and some the others.
    """
    own = {
        name.removeprefix(text.prefix): value
        for name, value in weights.items()
        if name.startswith(text.prefix) and not _WITHOUT_USE.fullmatch(name)
    }
    original = {name: value for name, value in own.items() if _OPEN_CLIP.fullmatch(name)}
    named = {
        match[1] or match[2]: value for name, value in own.items() if (match := _TRANSFORMERS.fullmatch(name))
    }
    strange = [name for name in own if name not in original and not _TRANSFORMERS.fullmatch(name)]
    _refuse(text.part, (f"{text.prefix}{name}" for name in strange))
    if original:
        named |= _from_open_clip(original)
    if not text.pooled:
        named.pop("text_projection.weight", None)
    if text.used is None:
        return named
    layers = {name: int(match[1]) for name in named if (match := _LAYER.match(name))}
    return {name: value for name, value in named.items() if layers.get(name, -1) < text.used}


def _from_open_clip(weights: Weights) -> dict[str, torch.Tensor]:
    """Query, key and value, which it keeps in one tensor, are separated; its projection is transposed."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    words = weights.get("model.token_embedding.weight")
    # What tells it the width if there is no projection.
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=0 if words is None else words.shape[1]))
    mapped = convert_open_clip_checkpoint(model, dict(weights), prefix="model.")
    return {name.removeprefix("text_model."): value for name, value in mapped.items()}


def _without_place(own: Weights, mapped: Weights) -> list[str]:
    """Tensors that the map left out, which it does without a word. It copies none: addresses tell them."""
    used = {address(value) for value in mapped.values()}
    return [name for name, value in own.items() if address(value) not in used]


def _refuse(part: str, names: Iterable[str]) -> None:
    if found := listed(names):
        raise ExportError(f"the {part} has too many: {found}")


def listed(names: Iterable[str]) -> str:
    """The first three names, and how many more there are; "" if none."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return f"{', '.join(ordered[:3])}{more}"
