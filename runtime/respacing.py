"""Sigmas that are spaced by a rule of their own, not by timesteps: Karras, exponential, beta."""

import math
from dataclasses import dataclass

import numpy as np

from allaprima.bundle.errors import RequestError
from allaprima.runtime.schedule import F64, Training, exponential_sigmas, karras_sigmas

_SHAPE = 0.6  # of the beta distribution, both parameters: Lee et al. 2024, section 4.2
_TERMS = 64  # 2**-64 is below the rounding of float64
_ITERATIONS = 60


@dataclass(frozen=True)
class Respacing(Training):
    """The fields that choose a rule.

    Not every scheduler declares ``sigma_min`` and ``sigma_max``, but all read them where the configuration
    of another scheduler left them.
    """

    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    sigma_min: float | None = None
    sigma_max: float | None = None

    @property
    def rule(self) -> str | None:
        """The field that is set.

        Raises:
            RequestError: more than one is.
        """
        names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        chosen = [name for name in names if getattr(self, name)]
        if len(chosen) > 1:
            raise RequestError(
                f"scheduler options {' and '.join(chosen)} exclude each other: set one to false"
            )
        return chosen[0] if chosen else None


def respaced(options: Respacing, low: float, high: float, steps: int) -> F64 | None:
    """The sigmas of the rule that is set, descending, float64 [steps], or None if none is.

    ``low`` and ``high`` are their ends unless the options say others.
    """
    rule = options.rule
    if rule is None:
        return None
    low = low if options.sigma_min is None else options.sigma_min
    high = high if options.sigma_max is None else options.sigma_max
    if not 0 < low <= high < math.inf:
        raise RequestError(f"sigma_min={low} and sigma_max={high} are no range of sigmas above 0")
    if rule == "use_karras_sigmas":
        return karras_sigmas(low, high, steps)
    if rule == "use_exponential_sigmas":
        return exponential_sigmas(low, high, steps)
    return beta_sigmas(low, high, steps)


def beta_sigmas(low: float, high: float, steps: int) -> F64:
    """Lee et al. 2024 (arXiv 2407.12173): quantiles of a beta distribution, dense at both ends, [steps]."""
    return low + (high - low) * beta_quantile(1 - np.linspace(0, 1, steps), _SHAPE)


def beta_quantile(probability: F64, shape: float) -> F64:
    """The inverse of the regularised incomplete beta function I(x; a, a), for a shape ``a`` below 1.

    Up to the median the integral is the series ``x**a * sum_k binomial_k * x**k / (a + k)`` of the integrand
    ``t**(a-1) * (1-t)**(a-1)``, beyond it symmetric. There it is concave, so Newton's method converges.
    """
    mass = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    order = np.arange(_TERMS)
    binomial = np.cumprod(np.append(1.0, (order[1:] - shape) / order[1:]))
    tail = np.minimum(probability, 1 - probability)
    x = np.minimum((tail * shape * mass) ** (1 / shape), 0.5)
    inside = x > 0
    target, root = tail[inside] * mass, x[inside]
    for _ in range(_ITERATIONS):
        integral = root**shape * ((root[:, None] ** order) @ (binomial / (shape + order)))
        density = (root * (1 - root)) ** (shape - 1)
        root = np.clip(root - (integral - target) / density, root / 2, 0.5)
    x[inside] = root
    return np.where(probability > 0.5, 1 - x, x)
