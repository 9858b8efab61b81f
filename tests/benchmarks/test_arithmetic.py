"""The arithmetic, on data whose answers are known, and against scipy's."""

import math

import numpy as np
import pytest
import scipy.stats

from allaprima.benchmarks.arithmetic import (
    Interval,
    Line,
    fit_line,
    percentile,
    poisson_arrivals,
    ratio_of_pairs,
    ratio_of_runs,
    student_quantile,
)
from allaprima.benchmarks.report import table
from allaprima.bundle import RequestError


@pytest.mark.parametrize(
    ("percent", "wanted"), [(50, 100), (90, 180), (99, 198), (99.5, 199), (100, 200), (0.1, 1)]
)
def test_percentile_is_a_value_that_was_seen(percent: float, wanted: float) -> None:
    values = [float(value) for value in range(200, 0, -1)]
    assert percentile(values, percent) == wanted
    assert sum(value <= wanted for value in values) >= percent / 100 * 200


def test_percentile_of_few_is_the_largest() -> None:
    assert percentile([3.0, 1.0, 2.0], 99) == 3.0
    assert percentile([4.0], 50) == 4.0
    for values, percent in (([], 50), ([1.0], 0), ([1.0], 101)):
        with pytest.raises(RequestError, match="percentile"):
            percentile(values, percent)


def test_a_line_is_found() -> None:
    steps = [1, 4, 8, 20]
    line = fit_line(steps, [0.3 + 0.05 * step for step in steps])
    assert line is not None
    assert (line.fixed, line.per_step) == (pytest.approx(0.3), pytest.approx(0.05))
    assert line.residual == pytest.approx(0, abs=1e-12)


def test_the_residual_is_relative() -> None:
    line = fit_line([0, 1, 2], [1.0, 2.0, 6.0])
    slope, fixed = np.polyfit([0, 1, 2], [1.0, 2.0, 6.0], 1)
    errors = [(1 - fixed) / 1, (2 - fixed - slope) / 2, (6 - fixed - 2 * slope) / 6]
    assert line is not None
    assert line.per_step == pytest.approx(slope)
    assert line.residual == pytest.approx(math.sqrt(sum(error**2 for error in errors) / 3))


def test_two_points_fit_any_line_and_one_none() -> None:
    assert fit_line([2, 4], [1.0, 2.0]) == Line(0.0, 0.5, None)
    assert fit_line([4, 4], [1.0, 2.0]) is None


@pytest.mark.parametrize("freedom", [1, 1.7, 2, 4, 30, 400])
@pytest.mark.parametrize("probability", [0.001, 0.3, 0.5, 0.9, 0.975, 0.9995])
def test_quantile_of_students_t(freedom: float, probability: float) -> None:
    wanted = scipy.stats.t.ppf(probability, freedom)
    assert student_quantile(probability, freedom) == pytest.approx(wanted, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("probability", "freedom"), [(0, 3), (1, 3), (0.9, 0)])
def test_no_quantile(probability: float, freedom: float) -> None:
    with pytest.raises(RequestError, match="quantile"):
        student_quantile(probability, freedom)


def test_the_ratio_of_runs_is_welchs() -> None:
    generator = np.random.default_rng(3)
    before, after = np.exp(generator.normal(0, 0.1, 5)), np.exp(generator.normal(0.2, 0.03, 7))
    found = ratio_of_runs(list(before), list(after))
    test = scipy.stats.ttest_ind(np.log(after), np.log(before), equal_var=False)
    low, high = np.exp(test.confidence_interval(0.95))
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-4), pytest.approx(high, rel=1e-4))
    assert found.ratio == pytest.approx(scipy.stats.gmean(after) / scipy.stats.gmean(before))


def test_an_interval_holds_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(400):
        runs = [list(np.exp(generator.normal(shift, 0.05, 4))) for shift in (0.0, 0.1)]
        found = ratio_of_runs(*runs)
        held += found is not None and found.low <= math.exp(0.1) <= found.high
    assert 0.92 * 400 <= held <= 0.98 * 400


def test_one_round_tells_nothing_of_the_spread() -> None:
    assert ratio_of_runs([1.0], [2.0, 2.1]) is None
    assert ratio_of_pairs([1.0], [2.0]) is None
    assert ratio_of_runs([1.0, 1.0], [2.0, 2.0]) == Interval(2.0, 2.0, 2.0)


def test_pairs_share_their_mood() -> None:
    """Two rounds of which one was three times slower for both: the ratio is known exactly all the same."""
    paired = ratio_of_pairs([1.0, 3.0], [2.0, 6.0])
    apart = ratio_of_runs([1.0, 3.0], [2.0, 6.0])
    assert paired is not None
    assert apart is not None
    assert (paired.ratio, paired.low, paired.high) == pytest.approx((2.0, 2.0, 2.0))
    assert apart.low < 0.1 < 20 < apart.high


def test_arrivals_are_a_poisson_process() -> None:
    arrivals = poisson_arrivals(4.0, 5000, seed=7)
    gaps = np.diff([0.0, *arrivals])
    assert (gaps >= 0).all()
    assert scipy.stats.kstest(gaps, scipy.stats.expon(scale=0.25).cdf).pvalue > 0.01
    counts = np.histogram(arrivals, bins=np.arange(0, arrivals[-1], 1.0))[0]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.15)
    assert poisson_arrivals(4.0, 5000, seed=7) == arrivals
    assert poisson_arrivals(4.0, 5000, seed=8) != arrivals
    assert poisson_arrivals(8.0, 3, seed=7) == pytest.approx([value / 2 for value in arrivals[:3]])
    for rate, count in ((0.0, 3), (1.0, 0), (math.nan, 3)):
        with pytest.raises(RequestError, match="arrivals"):
            poisson_arrivals(rate, count, seed=1)


def test_table() -> None:
    assert table(("a", "b"), [("x", "1"), ("y", "2")]) == [
        "| a | b |",
        "| :-- | --: |",
        "| x | 1 |",
        "| y | 2 |",
    ]
