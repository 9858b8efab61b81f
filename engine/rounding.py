"""The arithmetic of 8 bits: scales, what they cost, and channels that are evened out before.

A value is stored as `round(value / scale)`, ties to even, limited to [-128, 127]: ONNX's QuantizeLinear with
a zero point of 0, which is the only one that TensorRT takes. Weights leave out -128, so that their range is
the same to both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

Floats = NDArray[np.float32]
LARGEST = 127
SMALLEST = 2.0**-16
"""Scales are at least this: a subnormal of float16, but one with 8 bits."""
_SHARES = np.geomspace(0.2, 1.0, 41)
"""Of the largest value: where a range may be cut off."""
_STRENGTH = 0.5
"""How much of the difference between channels goes from activations to weights."""


@dataclass(frozen=True)
class Range:
    """What was seen of a tensor: the largest magnitude of each channel [C], and rows of values [N,C]."""

    largest: Floats
    rows: Floats

    def divided(self, factors: Floats) -> Range:
        """The same tensor with its channels divided by factors [C]."""
        return Range(self.largest / factors, self.rows / factors)


def round_scale(scale: NDArray[np.floating], dtype: DTypeLike) -> Floats:
    """Scales as they can be stored in `dtype`: rounded before anything is divided by them costs nothing."""
    rounded: Floats = np.maximum(scale, SMALLEST).astype(dtype).astype(np.float32)
    return rounded


def round_weight(weight: Floats, axis: int, dtype: DTypeLike) -> tuple[NDArray[np.int8], Floats]:
    """A weight in 8 bits, and the scales of its channels along `axis`, by the largest value of each."""
    others = tuple(index for index in range(weight.ndim) if index != axis)
    scale = round_scale(np.abs(weight).max(axis=others) / LARGEST, dtype)
    steps = weight / scale.reshape([-1 if index == axis else 1 for index in range(weight.ndim)])
    return np.clip(np.rint(steps), -LARGEST, LARGEST).astype(np.int8), scale


def choose_scale(seen: Range, dtype: DTypeLike) -> tuple[float, float]:
    """The scale of a whole tensor with the least error on what was seen of it, and that error.

    Values beyond a range are cut off, which may cost less than wider steps for all others. The error is the
    root mean square over that of the values.
    """
    values = seen.rows.ravel()
    power = float(np.square(values, dtype=np.float64).mean())
    best = float(round_scale(np.asarray(seen.largest.max() / LARGEST), dtype)), np.inf
    for share in _SHARES[::-1]:
        scale = float(round_scale(np.asarray(share * seen.largest.max() / LARGEST), dtype))
        steps = np.clip(np.rint(values / np.float32(scale)), -LARGEST - 1, LARGEST)
        error = float(np.square(values - steps * np.float32(scale), dtype=np.float64).mean())
        if error < best[1]:
            best = scale, error
    return best[0], float(np.sqrt(best[1] / power)) if power else 0.0


def even_out(largest: Floats, weights: Floats) -> Floats:
    """Factors [C] to divide activations by and to multiply weights by, for a product of both.

    `largest` are those of the activations' channels, `weights` those of the weights that multiply each. Where
    some channels are far larger than the others one scale for all leaves the others few steps; the weights
    have a scale for each output, and bear it better. G. Xiao et al., "SmoothQuant", arXiv 2211.10438,
    equation 4.
    """
    known = (largest > 0) & (weights > 0)
    factors = np.ones_like(largest)
    factors[known] = largest[known] ** _STRENGTH / weights[known] ** (1 - _STRENGTH)
    if known.any():  # the mean is 1, so that nothing comes near the ends of float16
        factors[known] /= np.exp(np.log(factors[known]).mean())
    limited: Floats = np.clip(factors, 1 / 64, 64).astype(np.float32)
    return limited
