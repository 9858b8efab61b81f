"""How latents look, for previews: the linear map that best fits what the autoencoder makes of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from allaprima.bundle import Latent, Preview

Floats = NDArray[np.float32]
Picture = NDArray[np.uint8]
Encode = Callable[[Sequence[Floats]], Sequence[NDArray[np.generic]]]
"""Pictures [1,3,height,width] in [-1,1] to the means of their latents [1,C,H,W], as the denoiser has them."""

COUNT, SIDE = 8, 128
"""How many pictures, and their side in pixels where the model's sizes allow: enough for a dozen numbers."""
DIGITS = 4
_SMALLEST = 1e-3


def fit_preview(encode: Encode, latent: Latent) -> Preview | None:
    """Least squares from latents to the mean colours of their pixels; None if latents are not finite.

    A poor fit is kept too: a dull preview is what such an autoencoder has to show. The same latents give the
    same map.
    """
    side = max(1, SIDE // latent.multiple) * latent.multiple
    random = np.random.default_rng(0)
    pictures = [_DRAWN[index % len(_DRAWN)](random, side) for index in range(COUNT)]
    encoded = encode([_encodable(picture) for picture in pictures])
    features = np.concatenate(
        [np.asarray(each, np.float64).reshape(latent.channels, -1).T for each in encoded]
    )
    colours = np.concatenate([_pooled(picture, latent.downscale) for picture in pictures])
    if not np.isfinite(features).all():
        return None
    # A channel that never changes is left out, instead of being blown up.
    features = np.append(features, np.ones((len(features), 1)), axis=1)
    solution = np.linalg.lstsq(features, colours, rcond=_SMALLEST)[0].round(DIGITS)
    rows = tuple(tuple(map(float, row)) for row in solution)
    return Preview(matrix=rows[:-1], offset=rows[-1])


def _encodable(picture: Picture) -> Floats:
    image = picture.astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    return np.ascontiguousarray(image)


def _pooled(picture: Picture, downscale: int) -> NDArray[np.float64]:
    """The mean colour of each block of pixels, from 0 to 1, [H*W,3]."""
    height, width = (side // downscale for side in picture.shape[:2])
    blocks = picture.reshape(height, downscale, width, downscale, 3)
    return np.asarray(blocks.mean((1, 3)).reshape(-1, 3) / 255)


def _smooth(random: np.random.Generator, side: int) -> Picture:
    """Colours that run into each other: a few, and straight lines between them."""
    few = random.integers(0, 256, (5, 5, 3)).astype(np.float64)
    places = np.linspace(0, len(few) - 1, side)
    weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(len(few))))
    smooth: NDArray[np.float64] = np.einsum("yi,xj,ijc->yxc", weights, weights, few)
    return smooth.round().astype(np.uint8)


def _patches(random: np.random.Generator, side: int) -> Picture:
    """Flat squares of many colours, of which some are pure and some gray."""
    few = random.integers(0, 256, (6, 6, 3), np.uint8)
    few[::2, ::2] = np.where(few[::2, ::2] < 128, 0, 255)
    few[1::2, 1::2] = few[1::2, 1::2, :1]
    nearest = np.arange(side) * len(few) // side
    return few[nearest][:, nearest]


def _things(random: np.random.Generator, side: int) -> Picture:
    """Ellipses and rectangles on a plain ground."""
    colours = random.integers(0, 256, (9, 3), np.uint8)
    picture = np.tile(colours[0], (side, side, 1))
    y, x = np.ogrid[:side, :side]
    for index, colour in enumerate(colours[1:]):
        across, down = random.integers(0, side, 2)
        wide, high = random.integers(side // 16, side // 4, 2)
        right, below = np.abs(x - across) / wide, np.abs(y - down) / high
        inside = np.hypot(right, below) if index % 2 else np.maximum(right, below)
        picture[inside <= 1] = colour
    return picture


def _rough(random: np.random.Generator, side: int) -> Picture:
    """Smooth colours under grain."""
    grain = random.normal(0, 30, (side, side, 1))
    return (_smooth(random, side) + grain).clip(0, 255).round().astype(np.uint8)


_DRAWN = (_smooth, _patches, _things, _rough)
