"""8 bits: as ONNX defines them, with scales that a graph can hold, and errors that are what is said."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx.reference import ReferenceEvaluator

from allaprima.engine.rounding import (
    SMALLEST,
    Range,
    choose_scale,
    even_out,
    round_scale,
    round_weight,
)

PAIR = onnx.parser.parse_model("""
<ir_version: 10, opset_import: ["" : 23]>
pair (float[N] x, float scale) => (float[N] y) <int8 zero = {0}> {
    narrow = QuantizeLinear (x, scale, zero)
    y = DequantizeLinear (narrow, scale, zero)
}
""")
WEIGHT = onnx.parser.parse_model("""
<ir_version: 10, opset_import: ["" : 23]>
weight (int8[N, M] values, float[N] scales) => (float[N, M] y) {
    y = DequantizeLinear <axis = 0> (values, scales)
}
""")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def test_the_error_is_that_of_onnx() -> None:
    rows = normal(500, 8)
    scale, error = choose_scale(Range(np.abs(rows).max(0), rows), np.float32)
    (made,) = ReferenceEvaluator(PAIR).run(None, {"x": rows.ravel(), "scale": np.float32(scale)})
    wanted = np.sqrt(np.square(made - rows.ravel()).mean() / np.square(rows).mean())
    assert error == pytest.approx(wanted, rel=1e-3)
    assert 0.002 < error < 0.02


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_are_off_by_half_a_step_at_most(dtype: type) -> None:
    weight = normal(6, 40) * np.geomspace(1e-2, 10, 6, dtype=np.float32)[:, None]
    values, scales = round_weight(weight, 0, dtype)
    assert (values.dtype, scales.shape) == (np.int8, (6,))
    assert np.array_equal(scales, scales.astype(dtype).astype(np.float32))
    (made,) = ReferenceEvaluator(WEIGHT).run(None, {"values": values, "scales": scales})
    # Rounding a scale down cuts the largest value off by a little.
    rounding = 127 * scales[:, None] * np.finfo(dtype).eps
    assert (np.abs(made - weight) <= scales[:, None] / 2 + rounding).all()
    assert np.abs(values).max(1).tolist() == [127] * 6


def test_channels_may_be_any_axis() -> None:
    weight = normal(3, 4, 5)
    values, scales = round_weight(weight, 1, np.float32)
    turned, same = round_weight(weight.transpose(1, 0, 2), 0, np.float32)
    assert np.array_equal(values.transpose(1, 0, 2), turned)
    assert np.array_equal(scales, same)


def test_nothing_is_divided_by_zero() -> None:
    values, scales = round_weight(np.zeros((2, 3), np.float32), 0, np.float16)
    assert not values.any()
    assert scales.tolist() == [SMALLEST, SMALLEST]
    scale, error = choose_scale(Range(np.zeros(3, np.float32), np.zeros((4, 3), np.float32)), np.float16)
    assert (scale, error) == (SMALLEST, 0.0)


def test_scales_of_half_precision_keep_eight_bits() -> None:
    wanted = np.geomspace(SMALLEST, 1, 100)
    assert np.abs(round_scale(wanted, np.float16) / wanted - 1).max() <= 2**-9


def test_an_outlier_is_cut_off() -> None:
    """One value of 12 among many thousands of about 1: steps for all count more than that one."""
    rows = normal(40000, 8)
    rows[0, 0] = 12
    wide = Range(np.abs(rows).max(0), rows)
    scale, error = choose_scale(wide, np.float32)
    assert scale < 0.7 * 12 / 127
    whole = rows.ravel() / (12 / 127)
    plain = np.sqrt(np.square(np.rint(whole) - whole).mean()) * (12 / 127) / np.sqrt(np.square(rows).mean())
    assert error < plain


def test_what_was_not_among_the_rows_counts_for_the_range() -> None:
    rows = np.full((100, 2), 0.5, np.float32)
    scale, _ = choose_scale(Range(np.float32([1, 127]), rows), np.float32)
    assert 0.2 <= scale <= 1.0


def test_evened_out_channels_lose_less() -> None:
    sizes = np.geomspace(0.02, 20, 16).astype(np.float32)
    rows, weight = normal(2000, 16) * sizes, normal(24, 16)
    seen = Range(np.abs(rows).max(0), rows)
    factors = even_out(seen.largest, np.abs(weight).max(0))
    exact = rows @ weight.T
    assert np.allclose((rows / factors) @ (weight * factors).T, exact, rtol=1e-3, atol=1e-3)

    def error(seen: Range, weight: np.ndarray) -> float:
        scale, _ = choose_scale(seen, np.float32)
        steps = np.clip(np.rint(seen.rows / scale), -128, 127) * scale
        values, scales = round_weight(weight, 0, np.float32)
        return float(np.square(steps @ (values * scales[:, None]).T - exact).mean())

    assert error(seen.divided(factors), weight * factors) < error(seen, weight) / 2


def test_channels_that_are_zero_stay_as_they_are() -> None:
    factors = even_out(np.float32([0, 4, 1]), np.float32([1, 0, 1]))
    assert factors.tolist() == [1, 1, 1]
    assert np.isfinite(even_out(np.float32([1e-30, 1e30]), np.float32([1, 1]))).all()
