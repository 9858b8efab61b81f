"""Painting over a part of a picture: what the mask keeps is put back after every step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from allaprima.bundle import RequestError
from allaprima.runtime.pictures import Source, read_picture

Floats = NDArray[np.float32]


def read_mask(source: Source, picture: Image.Image) -> Image.Image:
    """A mask for a picture, in shades of gray: white is painted over, black is kept.

    Raises RequestError: as `read_picture`, or if it is not of the picture's size.
    """
    mask = read_picture(source, "mask").convert("L")
    if mask.size != picture.size:
        raise RequestError(
            f"the mask has {mask.size[0]} x {mask.size[1]} pixels, the image {picture.size[0]} x "
            f"{picture.size[1]}: hand in two of one size"
        )
    return mask


def latent_mask(mask: Image.Image, height: int, width: int, downscale: int) -> Floats:
    """1 where the latents [H,W] are to be painted over, 0 where they stay.

    Resized to `height` x `width` pixels and cut at half, of which each latent takes its first pixel, as
    diffusers does it.
    """
    return _cut(mask, height, width)[::downscale, ::downscale].astype(np.float32)


def grown(mask: Floats) -> Floats:
    """A mask of latents [H,W] whose ones spread to their neighbours, as diffusers' Kandinsky has them spread.

    They go up, left, down, right, and along one of the two diagonals: an oversight there, mirrored here.
    """
    spread = mask.copy()
    for down, right in ((1, 0), (0, 1), (1, 1)):
        height, width = mask.shape[0] - down, mask.shape[1] - right
        spread[down:, right:] = np.maximum(spread[down:, right:], mask[:height, :width])
        spread[:height, :width] = np.maximum(spread[:height, :width], mask[down:, right:])
    return spread


def without(image: Floats, mask: Image.Image) -> Floats:
    """A picture [1,3,height,width] in [-1,1], gray where the mask is white."""
    return np.where(_cut(mask, *image.shape[2:]), np.float32(0), image)


def _cut(mask: Image.Image, height: int, width: int) -> NDArray[np.bool_]:
    resized = mask.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized, np.float32) / 255 >= 0.5


@dataclass(frozen=True)
class Kept:
    """A picture's latents and the first noise, [B,C,H,W] each, and where they count no more, `mask` [H,W]."""

    mask: Floats
    latents: Floats
    noise: Floats

    def put_back(self, sample: Floats, clean: float, noise: float) -> None:
        """Overwrite what is kept in a sample [B,C,H,W], at its level of noise."""
        kept = np.float32(clean) * self.latents + np.float32(noise) * self.noise
        sample[...] = (1 - self.mask) * kept + self.mask * sample

    def restore(self, sample: Floats, levels: NDArray[np.float32], row: int) -> None:
        """Put back what is kept after the call of a row of a table with these `levels`."""
        self.put_back(sample, *(levels[row + 1] if row + 1 < len(levels) else (1.0, 0.0)))
