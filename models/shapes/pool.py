"""What the UNet learns from, computed once: latents, caption states and class maps of many scenes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from transformers import CLIPTextModel, CLIPTokenizer

from allaprima.models.shapes.captions import caption
from allaprima.models.shapes.scenes import COLOURS, KINDS, Scene, draw_split, render
from allaprima.models.shapes.training import autocast, batches, device, generator

CAPTIONS = 2
"""Wordings kept for each scene."""
MAP_CLASSES = (len(KINDS) + 1, len(COLOURS))
"""Classes of the two maps: which shape covers a latent cell (0: none), and which colour."""


@dataclass(frozen=True)
class Pool:
    """Scenes of one canvas.

    `latents` float16 [N, 4, H, W], scaled; `states` float16 [N, CAPTIONS, 77, width]; `maps` uint8
    [N, 2, H, W] (see `MAP_CLASSES`); `nothing` float16 [77, width], the states of the empty caption.
    """

    latents: torch.Tensor
    states: torch.Tensor
    maps: torch.Tensor
    nothing: torch.Tensor


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids int64 [B, 77] on the training device."""
    encoded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return torch.as_tensor(encoded.input_ids, device=device())


def as_batch(scenes: list[Scene]) -> torch.Tensor:
    """Rendered scenes of one size, float32 [B, 3, height, width] in [-1, 1]."""
    return to_tensor(np.stack([render(scene) for scene in scenes]))


def to_tensor(pictures: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 [B, height, width, 3] to float32 [B, 3, height, width] in [-1, 1]."""
    return torch.from_numpy(pictures).to(device()).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def class_maps(scene: Scene) -> NDArray[np.uint8]:
    """For each latent cell the shape in whose enclosing circle it lies, and its colour: uint8 [2, H, W]."""
    rows, columns = (np.arange(side // 8) * 8 + 4 for side in (scene.height, scene.width))
    kinds = np.zeros((len(rows), len(columns)), np.uint8)
    colours = np.full_like(kinds, COLOURS.index(scene.background))
    for thing in scene.things:
        inside = (rows[:, None] - thing.y) ** 2 + (columns - thing.x) ** 2 <= thing.radius**2
        kinds[inside] = KINDS.index(thing.kind) + 1
        colours[inside] = COLOURS.index(thing.colour)
    return np.stack([kinds, colours])


@torch.no_grad()
def make_pool(
    file: Path,
    seed: int,
    canvas: tuple[int, int],
    count: int,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    vae: AutoencoderKL,
) -> Pool:
    """`count` training scenes of one canvas, from `file` if it exists."""
    if file.exists():
        return Pool(**torch.load(file, weights_only=True))
    random = generator(6, seed, *canvas)
    scenes = [draw_split(random, False, *canvas) for _ in range(count)]
    texts = [caption(scene, random) for scene in scenes for _ in range(CAPTIONS)]
    vae.to(memory_format=torch.channels_last)  # 2.6 times as fast on a CPU
    latents = [_latents(vae, scenes[part]) for part in batches(count, 64)]
    states = [_states(encoder, tokenizer, texts[part]) for part in batches(len(texts), 128)]
    tensors = {
        "latents": torch.cat(latents),
        "states": torch.cat(states).view(count, CAPTIONS, *states[0].shape[1:]),
        "maps": torch.from_numpy(np.stack([class_maps(scene) for scene in scenes])),
        "nothing": _states(encoder, tokenizer, [""])[0],
    }
    partial = file.with_suffix(".partial")
    torch.save(tensors, partial)
    partial.replace(file)
    return Pool(**tensors)


def _latents(vae: AutoencoderKL, scenes: list[Scene]) -> torch.Tensor:
    pictures = as_batch(scenes).contiguous(memory_format=torch.channels_last)
    with autocast():
        mean: torch.Tensor = vae.encode(pictures).latent_dist.mean
    scale: float = vae.config.scaling_factor
    return (mean.float() * scale).half().cpu()


def _states(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    with autocast():
        states: torch.Tensor = encoder(token_ids(tokenizer, texts)).last_hidden_state
    return states.half().cpu()
