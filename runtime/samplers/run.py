"""What a request asks of a sampler, beside the configuration of the model."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from allaprima.bundle.errors import RequestError
from allaprima.runtime.schedule import F64


@dataclass(frozen=True)
class Churn:
    """Noise put in before each step: Karras et al. 2022, algorithm 2, with its names; none by default."""

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0


@dataclass(frozen=True)
class Run:
    """The checked arguments of one table."""

    steps: int
    eta: float = 0.0
    churn: Churn = Churn()
    order: int | None = None
    """That of a linear multistep method, None for its usual one."""
    timesteps: F64 | None = None
    """[steps], instead of those that the sampler would list."""
    sigmas: F64 | None = None
    """Instead of those of the timesteps."""
    begin: int = 0
    """Steps left out at the beginning, because a picture is there already; a history starts empty here."""


def read_number(name: str, value: Any) -> float:
    """A number, for one of the arguments; RequestError if it is none."""
    if isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value):
        return float(value)
    raise RequestError(f"{name} {value!r} is not a number")


def read_churn(s_churn: Any, s_tmin: Any, s_tmax: Any, s_noise: Any) -> Churn:
    """The checked arguments of those names; RequestError if they are out of range."""
    given = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    churn = Churn(**{name: read_number(name, value) for name, value in given.items()})
    finite = math.isfinite(churn.s_churn) and math.isfinite(churn.s_noise)
    if not (finite and churn.s_churn >= 0 and churn.s_noise >= 0 and 0 <= churn.s_tmin <= churn.s_tmax):
        raise RequestError(
            f"s_churn {s_churn}, s_noise {s_noise}, s_tmin {s_tmin} and s_tmax {s_tmax} must not be negative,"
            " nor s_tmin above s_tmax, nor the first two infinite"
        )
    return churn


def read_custom(name: str, values: Sequence[float] | None) -> F64 | None:
    """Custom timesteps or sigmas: finite numbers, none negative, in descending order.

    Raises:
        RequestError: they are not.
    """
    if values is None:
        return None
    try:
        numbers = np.array(values, np.float64)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{name} {values!r} are not numbers") from error
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise RequestError(f"{name} {values!r} are not a list of finite numbers")
    if numbers.min() < 0 or np.any(np.diff(numbers) >= 0):
        raise RequestError(f"{name} {values!r} must descend and must not be negative")
    return numbers


def read_steps(steps: Any, most: int, timesteps: F64 | None, sigmas: F64 | None, closed: bool) -> int:
    """The number of steps, which a custom schedule determines by itself.

    ``most`` is the number of timesteps of training; if ``closed``, the last of the sigmas is that of the
    result, so that there is one more of them than there are steps.

    Raises:
        RequestError: out of range, or in contradiction to the custom schedule.
    """
    if timesteps is not None and sigmas is not None:
        raise RequestError("timesteps and sigmas exclude each other: give one of them")
    given = timesteps if timesteps is not None else sigmas
    count = None if given is None else len(given) - (closed and sigmas is not None)
    try:
        value = count if steps is None and count is not None else operator.index(steps)
    except TypeError as error:
        raise RequestError(f"num_inference_steps {steps!r} is not an integer") from error
    if count is not None and value != count:
        raise RequestError(
            f"num_inference_steps {value} contradicts the custom schedule of {count} steps: leave it out"
        )
    if not 1 <= value <= most:
        raise RequestError(f"num_inference_steps {value} is out of range: this model takes 1 to {most}")
    return value
