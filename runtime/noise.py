"""Gaussian noise with the stream of ``torch.Generator("cpu")``, without torch.

A seed is part of what a picture is, so the numbers must be those that PyTorch draws on a CPU. Its generator
is the classic mt19937, which NumPy has too; its float32 normals are a Box-Muller transform in single
precision with the logarithm, sine and cosine of the Cephes library (as vectorised by J. Pommier's
``avx_mathfun``), which are rebuilt here operation by operation, because the last bit of a polynomial depends
on the order of its operations.

Bit-equal to PyTorch on x86-64 with AVX2 or newer; other CPUs round differently (by some 1e-6).
"""

import math
import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from allaprima.bundle.errors import RequestError

_F32 = NDArray[np.float32]
_BLOCK = 16  # PyTorch transforms 16 uniforms at a time; smaller tensors take a scalar path in float64
_HALF = _BLOCK // 2

# Cephes logf: polynomial in m - 1 for m in [sqrt(1/2), sqrt(2)), highest power first, and ln 2 in two parts.
_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Cephes sinf and cosf: pi / 4 in three parts (negated), and the polynomials on [-pi/4, pi/4].
_QUARTER_PI = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def turned(noise: _F32, other: _F32, share: float) -> _F32:
    """`noise`, turned towards `other` by a share from 0 to 1: spherical interpolation of the two as vectors.

    Both are normal, and so is what comes out, where a mean of the two would be too quiet.
    """
    one, two = noise.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    cosine = float(one @ two / (np.linalg.norm(one) * np.linalg.norm(two)))
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    if math.sin(angle) < 1e-6:
        return noise
    mixed = (math.sin((1 - share) * angle) * one + math.sin(share * angle) * two) / math.sin(angle)
    return mixed.reshape(noise.shape).astype(np.float32)


class Noise:
    """The normal numbers that ``torch.Generator("cpu").manual_seed(seed)`` gives, in the same order.

    Args:
        seed: 0 <= seed < 2**64. PyTorch uses the low 32 bits only: seeds that agree there are one stream.

    Raises:
        RequestError: the seed is not an integer of that range.
    """

    def __init__(self, seed: int) -> None:
        try:
            value = operator.index(seed)
        except TypeError as error:
            raise RequestError(f"seed {seed!r} is not an integer") from error
        if not 0 <= value < 2**64:
            raise RequestError(f"seed {value} is out of range: give an integer from 0 to 2**64 - 1")
        self._words = np.random.RandomState(value & 0xFFFFFFFF)
        self._partner: float | None = None

    def normal(self, shape: tuple[int, ...]) -> _F32:
        """Draw what ``torch.randn(shape, generator=generator)`` would, float32; the stream continues."""
        count = math.prod(shape)
        if count < _BLOCK:
            return np.array([self._scalar() for _ in range(count)], np.float32).reshape(shape)
        tail = count % _BLOCK
        uniforms = self._uniforms(count + (_BLOCK if tail else 0))
        normals = np.empty(count, np.float32)
        normals[: count - tail] = _box_muller(uniforms[: count - tail])
        if tail:  # a ragged end overwrites the last 16 numbers with a block of fresh uniforms
            normals[-_BLOCK:] = _box_muller(uniforms[count:])
        return normals.reshape(shape)

    def _uniforms(self, count: int) -> _F32:
        """Uniforms in [0, 1) with 24 bits, one word each."""
        words = self._words.randint(0, 2**32, count, np.uint32)
        return (words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)

    def _scalar(self) -> float:
        """One normal in float64; they come in pairs, and the second waits for the next scalar draw."""
        if self._partner is not None:
            value, self._partner = self._partner, None
            return value
        words = [int(word) for word in self._words.randint(0, 2**32, 4, np.uint32)]
        u1, u2 = ((high << 32 | low) % 2**53 * 2.0**-53 for high, low in (words[:2], words[2:]))
        radius, angle = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
        self._partner = radius * math.sin(angle)
        return radius * math.cos(angle)


class Draws:
    """The noise of a run, call by call: each picture has its stream."""

    def __init__(self, streams: Sequence[Noise]) -> None:
        self._streams = streams
        self._last: list[_F32] = []

    def fill(self, noise: _F32, echo: float) -> None:
        """Write the next draw of every stream into `noise` [B,...], and `echo` times the draw before it."""
        fresh = [stream.normal(noise.shape[1:]) for stream in self._streams]
        for index, values in enumerate(fresh):
            noise[index] = values + np.float32(echo) * self._last[index] if echo else values
        self._last = fresh


def _box_muller(uniforms: _F32) -> _F32:
    """Normals from whole blocks of 16 uniforms: the first 8 give the radii, the last 8 the angles."""
    pairs = uniforms.reshape(-1, 2, _HALF)
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - pairs[:, 0]))
    sine, cosine = _sincos(np.float32(2 * np.pi) * pairs[:, 1])
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)


def _fma(a: _F32, b: _F32 | float, c: _F32 | float) -> _F32:
    """``a * b + c`` in float32 with one rounding, as the CPU instruction does it.

    The product of two float32 is exact in float64, the sum is not always: where it landed on the midpoint of
    two float32 values, what the sum lost decides the direction (Knuth's TwoSum recovers it).
    """
    product = a.astype(np.float64) * np.float32(b)
    addend = np.broadcast_to(np.asarray(c, np.float32), product.shape).astype(np.float64)
    total = product + addend
    ties = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if ties.any():
        p, q, s = product[ties], addend[ties], total[ties]
        part = s - p
        lost = (p - (s - part)) + (q - part)
        total[ties] = np.where(lost == 0, s, np.nextafter(s, np.copysign(np.inf, lost)))
    return total.astype(np.float32)


def _horner(x: _F32, coefficients: tuple[float, ...]) -> _F32:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma(value, x, coefficient)
    return value


def _log(x: _F32) -> _F32:
    """Natural logarithm of normal positive numbers."""
    bits = x.view(np.uint32)
    exponent = (bits >> np.uint32(23)).astype(np.float32) - np.float32(126)
    mantissa = ((bits & np.uint32(0x807FFFFF)) | np.uint32(0x3F000000)).view(np.float32)
    low = mantissa < np.float32(math.sqrt(0.5))
    exponent = exponent - low.astype(np.float32)
    m = (mantissa - np.float32(1)) + np.where(low, mantissa, np.float32(0))
    square = m * m
    value = _horner(m, _LOG) * m
    value = _fma(value, square, exponent * np.float32(_LN2_LOW))
    value = _fma(square, -0.5, value)
    return _fma(exponent, _LN2_HIGH, m + value)


def _sincos(x: _F32) -> tuple[_F32, _F32]:
    """Sine and cosine of non-negative angles."""
    octant = ((x * np.float32(4 / np.pi)).astype(np.int32) + 1) & ~1
    for part in _QUARTER_PI:
        x = _fma(octant.astype(np.float32), part, x)
    square = x * x
    cosine = _horner(square, _COS) * square
    cosine = _fma(cosine, square, square * np.float32(-0.5)) + np.float32(1)
    sine = _horner(square, _SIN) * square
    sine = _fma(sine, x, x)
    swap = (octant & 2) != 0
    sine, cosine = np.where(swap, cosine, sine), np.where(swap, sine, cosine)
    sign_sine, sign_cosine = (octant & 4) != 0, (~(octant - 2) & 4) != 0
    return np.where(sign_sine, -sine, sine), np.where(sign_cosine, -cosine, cosine)
