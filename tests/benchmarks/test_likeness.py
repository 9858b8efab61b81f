"""How like two pictures are."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from allaprima.benchmarks.likeness import BEST, psnr, ssim
from allaprima.bundle import RequestError

BLACK = np.zeros((16, 24, 3), np.uint8)
NOISE = np.random.default_rng(3).integers(0, 256, (32, 24, 3), np.uint8)


def test_psnr() -> None:
    assert psnr(BLACK, BLACK) == BEST
    assert psnr(BLACK, BLACK + np.uint8(255)) == 0
    assert psnr(BLACK, BLACK + np.uint8(1)) == pytest.approx(48.13, abs=0.01)


def test_psnr_is_that_of_scikit_image() -> None:
    other = (NOISE // 2 + 40).astype(np.uint8)
    assert psnr(NOISE, other) == pytest.approx(peak_signal_noise_ratio(NOISE, other, data_range=255))


def test_ssim_of_constant_pictures_is_the_formula() -> None:
    """Without variance only the term of luminance is left: (2ab + c) / (a² + b² + c), c = (0.01 · 255)²."""
    one, other = BLACK + np.uint8(100), BLACK + np.uint8(140)
    c = (0.01 * 255) ** 2
    assert ssim(one, other) == pytest.approx((2 * 100 * 140 + c) / (100**2 + 140**2 + c), abs=1e-6)


def test_ssim_sees_structure() -> None:
    assert ssim(NOISE, NOISE) == pytest.approx(1)
    assert ssim(NOISE, NOISE[::-1].copy()) < 0.2
    assert ssim(NOISE, (255 - NOISE).astype(np.uint8)) < 0


def test_pictures_that_cannot_be_compared() -> None:
    for measure in (psnr, ssim):
        with pytest.raises(RequestError, match="24x16 and 24x32"):
            measure(BLACK, NOISE)
    with pytest.raises(RequestError, match="11 pixels a side or more, not 24x8"):
        ssim(BLACK[:8], BLACK[:8])
