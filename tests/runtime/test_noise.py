"""The noise is that of PyTorch's CPU generator, bit for bit."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from allaprima.bundle.errors import RequestError
from allaprima.runtime.noise import Noise, _fma, turned

# PyTorch's vectorised kernels, which x86-64 has since 2013; elsewhere it rounds differently.
VECTORISED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
SHAPES = st.lists(st.integers(0, 70), min_size=0, max_size=2).map(tuple)


def assert_same(actual: NDArray[np.float32], expected: torch.Tensor) -> None:
    assert actual.dtype == np.float32
    assert actual.flags.c_contiguous
    assert actual.shape == tuple(expected.shape)
    if VECTORISED:
        np.testing.assert_array_equal(actual.view(np.uint32), expected.numpy().view(np.uint32))
    else:
        np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), shapes=st.lists(SHAPES, min_size=1, max_size=6))
def test_stream_of_torch(seed: int, shapes: list[tuple[int, ...]]) -> None:
    noise, generator = Noise(seed), torch.Generator("cpu").manual_seed(seed)
    for shape in shapes:
        assert_same(noise.normal(shape), torch.randn(shape, generator=generator))


@pytest.mark.parametrize("seed", [0, 42, 2**32 + 7, 2**63 - 1, 2**64 - 1])
def test_sizes_of_pictures(seed: int) -> None:
    noise, generator = Noise(seed), torch.Generator("cpu").manual_seed(seed)
    for shape in ((1, 4, 64, 64), (3,), (1, 4, 16, 24), (17,), (1,), (15,), (1, 4, 13, 7), (100_003,), ()):
        assert_same(noise.normal(shape), torch.randn(shape, generator=generator))


@pytest.mark.parametrize(
    ("seed", "first"),
    [
        (42, [1.9269152879714966, 1.4872840642929077, 0.9007171988487244, -2.1055209636688232]),
        (0, [-1.1258398294448853, -1.152360200881958, -0.2505785822868347, -0.4338788092136383]),
    ],
)
def test_known_numbers(seed: int, first: list[float]) -> None:
    assert Noise(seed).normal((1, 4, 64, 64)).ravel()[:4].tolist() == first


def test_low_32_bits_make_the_stream() -> None:
    np.testing.assert_array_equal(Noise(5).normal((20,)), Noise(5 + 2**32).normal((20,)))


def test_small_draws_come_in_pairs() -> None:
    """The second of a pair waits in the generator, also across a large draw."""
    noise, generator = Noise(3), torch.Generator("cpu").manual_seed(3)
    for count in (1, 40, 1, 2, 16, 3):
        assert_same(noise.normal((count,)), torch.randn(count, generator=generator))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(RequestError, match=rf"seed {seed} is out of range"):
        Noise(seed)


@pytest.mark.parametrize("seed", [1.0, "7", None])
def test_seed_of_another_type(seed: Any) -> None:
    with pytest.raises(RequestError, match="is not an integer"):
        Noise(seed)
    assert Noise(np.uint64(7)).normal((1,)) == Noise(7).normal((1,))  # type: ignore[arg-type]


def rounded(value: Fraction) -> np.float32:
    """The nearest float32, ties to even; float32 neighbours of a first guess decide."""
    guess = np.float32(float(value))
    around = [np.nextafter(guess, np.float32(side)) for side in (-np.inf, np.inf)] + [guess]
    return min(around, key=lambda x: (abs(Fraction(float(x)) - value), int(x.view(np.uint32)) & 1))


FLOATS = st.floats(2.0**-20, 2.0**20, width=32)


@settings(max_examples=200, deadline=None)
@given(a=FLOATS, b=FLOATS, c=st.one_of(FLOATS, FLOATS.map(lambda x: -x)))
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    assert _fma(np.array([a], np.float32), b, c)[0] == rounded(exact)


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((2.0**-24, 1.0), 1 + 2.0**-22),  # exactly halfway: to the even neighbour
        ((2.0**-24 * (1 + 2.0**-23), 1 - 2.0**-23), 1 + 2.0**-23),  # 2**-70 below it
        ((-(2.0**-24) * (1 + 2.0**-23), 1 - 2.0**-23), 1 + 2.0**-23),  # 2**-70 above another midpoint
    ],
)
def test_fma_where_rounding_twice_is_wrong(factors: tuple[float, float], expected: float) -> None:
    """The sum with 1 + 2**-23 is so near a midpoint of float32 that float64 cannot tell them apart."""
    a, b = factors
    assert _fma(np.array([a], np.float32), b, 1 + 2.0**-23)[0] == expected


def test_turned() -> None:
    one, two = Noise(1).normal((4, 16, 16)), Noise(2).normal((4, 16, 16))
    assert np.array_equal(turned(one, two, 0.0), one)
    np.testing.assert_allclose(turned(one, two, 1.0), two, atol=1e-6)
    assert np.array_equal(turned(one, one, 0.5), one)
    for share in (0.1, 0.5, 0.9):
        between = turned(one, two, share)
        assert between.dtype == np.float32
        assert abs(between.std() - 1) < 0.05  # a mean of the two would have 0.71
        near = np.corrcoef(between.ravel(), one.ravel())[0, 1]
        assert abs(near - np.cos(share * np.pi / 2)) < 0.05
