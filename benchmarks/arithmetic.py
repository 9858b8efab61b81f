"""From seconds to what is reported: percentiles, a straight line, intervals of ratios, Poisson arrivals.

NumPy alone, on plain sequences of numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allaprima.bundle import RequestError


@dataclass(frozen=True)
class Interval:
    """A ratio, and the ends of its confidence interval."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """latency = fixed + per_step * steps, in seconds.

    `residual` is the root mean square of (measured - line) / measured; None of two points, which always fit.
    """

    fixed: float
    per_step: float
    residual: float | None


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all do not exceed (nearest rank), as MLPerf counts.

    Of few values, the high percentiles are the largest: it never tells of a value that was not seen.
    """
    if not values or not 0 < percent <= 100:
        raise RequestError(
            f"percentile {percent} of {len(values)} values: needs 1 value, and 0 < percent <= 100"
        )
    # Rounded first: 99 / 100 * 200 should be 198, not a hair above it.
    return sorted(values)[math.ceil(round(percent / 100 * len(values), 9)) - 1]


def fit_line(steps: Sequence[int], seconds: Sequence[float]) -> Line | None:
    """The least-squares line through the points; None if all have the same number of steps."""
    if len(set(steps)) < 2:
        return None
    x, y = np.asarray(steps, np.float64), np.asarray(seconds, np.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / np.square(x - x.mean()).sum())
    fixed = float(y.mean() - slope * x.mean())
    residual = float(np.sqrt(np.square((y - fixed - slope * x) / y).mean()))
    return Line(fixed, slope, residual if len(set(steps)) > 2 else None)


def student_quantile(probability: float, freedom: float) -> float:
    """The quantile of Student's t distribution with `freedom` > 0 degrees of freedom.

    With t = sqrt(freedom) tan(angle) the density becomes cos(angle) ** (freedom - 1), which is summed here.
    """
    if not 0 < probability < 1 or not freedom > 0:
        raise RequestError(f"no quantile of t: probability {probability}, degrees of freedom {freedom}")
    if probability < 0.5:
        return -student_quantile(1 - probability, freedom)
    # Quadratic towards the far end, where 1 degree of freedom and a probability near 1 want the finest steps.
    turn = 1 - np.square(np.linspace(1, 0, 20_001))
    angle = turn * math.pi / 2
    middle = (angle[1:] + angle[:-1]) / 2
    mass = np.concatenate([[0.0], np.cumsum(np.cos(middle) ** (freedom - 1) * np.diff(angle))])
    return float(math.sqrt(freedom) * math.tan(np.interp((2 * probability - 1) * mass[-1], mass, angle)))


def ratio_of_runs(before: Sequence[float], after: Sequence[float], level: float = 0.95) -> Interval | None:
    """after / before from independent measurements, by Welch's interval on their logarithms.

    Each value stands for one round, whose own values are not independent. None for fewer than two of either:
    nothing is known of the spread then.
    """
    if min(len(before), len(after)) < 2:
        return None
    logs = [np.log(np.asarray(values, np.float64)) for values in (before, after)]
    variances = [float(each.var(ddof=1)) / each.size for each in logs]
    middle = float(logs[1].mean() - logs[0].mean())
    total = sum(variances)
    if total == 0:
        return Interval(math.exp(middle), math.exp(middle), math.exp(middle))
    freedom = total**2 / sum(v**2 / (each.size - 1) for v, each in zip(variances, logs, strict=True))
    return _interval(middle, math.sqrt(total), freedom, level)


def ratio_of_pairs(before: Sequence[float], after: Sequence[float], level: float = 0.95) -> Interval | None:
    """after / before where the values with the same index were measured one after the other.

    The interval of the mean of the logarithms of their ratios; None for fewer than two pairs.
    """
    count = min(len(before), len(after))
    if count < 2:
        return None
    logs = [math.log(b / a) for a, b in zip(before[:count], after[:count], strict=True)]
    error = statistics.stdev(logs) / math.sqrt(count)
    return _interval(statistics.fmean(logs), error, count - 1, level)


def _interval(middle: float, error: float, freedom: float, level: float) -> Interval:
    reach = student_quantile(1 - (1 - level) / 2, freedom) * error
    return Interval(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach))


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which `count` queries arrive, `rate` in a second on average, the gaps exponential."""
    if not rate > 0 or count < 1:
        raise RequestError(f"{count} arrivals at {rate} a second: needs at least 1, at a rate above 0")
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return [float(moment) for moment in np.cumsum(gaps)]
