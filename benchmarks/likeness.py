"""How like two 8-bit pictures are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allaprima.bundle import RequestError

Picture = NDArray[np.uint8]
"""[height, width, 3]."""
BEST = 99.0
"""What stands for equal pictures, in dB."""
SMALLEST = 11
"""The window of SSIM, in pixels."""


def psnr(one: Picture, other: Picture) -> float:
    """Peak signal-to-noise ratio in dB, at most `BEST`. Raises RequestError if the sizes differ."""
    _check(one, other)
    error = float(np.square(one.astype(np.float64) - other).mean())
    return min(BEST, 10 * math.log10(255**2 / error)) if error else BEST


def spread(likeness: Sequence[float]) -> dict[str, float]:
    """What results say of the PSNR of many pictures, in dB; below 35 dB a difference can be seen."""
    ordered = sorted(likeness)
    return {
        "smallest": ordered[0],
        "median": statistics.median(ordered),
        "below 35": sum(each < 35 for each in ordered),
    }


def ssim(one: Picture, other: Picture) -> float:
    """Structural similarity as its authors define it, the mean over the channels; 1 for equal pictures.

    Z. Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004): a
    Gaussian window of sigma 1.5. Raises RequestError if the sizes differ or a side is shorter than
    `SMALLEST`, ImportError without scikit-image.
    """
    from skimage.metrics import structural_similarity

    _check(one, other)
    if min(one.shape[:2]) < SMALLEST:
        raise RequestError(f"SSIM needs pictures of {SMALLEST} pixels a side or more, not {_size(one)}")
    like: Any = structural_similarity(  # type: ignore[no-untyped-call]
        one,
        other,
        channel_axis=-1,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(like)


def _check(one: Picture, other: Picture) -> None:
    if one.shape != other.shape:
        raise RequestError(f"pictures of {_size(one)} and {_size(other)} cannot be compared")


def _size(picture: Picture) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"
