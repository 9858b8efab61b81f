"""DEIS in log-rho time (Zhang and Chen 2022, arXiv 2204.13902, section 4), orders 1 to 3.

In rho = sigma / alpha the ODE of the rescaled sample is d(x / alpha) = noise d(rho): the noise is written as
a polynomial in ln(rho) through the last predictions, and integrated exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.polynomial.polynomial import Polynomial, polyfromroots

from allaprima.runtime.samplers.lambda_space import (
    FEW_STEPS,
    LambdaOptions,
    check,
    flow_sigmas,
    lambda_schedule,
    path_of,
    predicted,
    training_table,
)
from allaprima.runtime.samplers.run import Run
from allaprima.runtime.samplers.table import Draft
from allaprima.runtime.schedule import F64, read_options, require


@dataclass(frozen=True)
class DEISOptions(LambdaOptions):
    """Fields and defaults of ``DEISMultistepScheduler``."""

    sampler: ClassVar[str] = "deis"

    algorithm_type: str = "deis"
    solver_type: str = "logrho"


def deis(config: Mapping[str, Any], run: Run) -> Draft:
    """The prediction is the noise; the order grows from 1 as the history fills."""
    options = read_options(DEISOptions, config)
    check(options)
    require(options, "algorithm_type", "deis", "dpmsolver", "dpmsolver++")
    require(options, "solver_type", "logrho", "midpoint", "heun", "bh1", "bh2")
    if options.use_flow_sigmas:
        sigmas = flow_sigmas(options, run.steps)
        timesteps = np.trunc(sigmas * options.num_train_timesteps)
    else:
        timesteps, sigmas = lambda_schedule(options, run)
    own = options.use_flow_sigmas or options.rule
    path = path_of(options, sigmas, float(sigmas[-1] if own else training_table(options)[0]))
    calls = len(timesteps)
    update = np.zeros((calls, 3 + options.solver_order - 1))
    for call in range(run.begin, calls):
        order = min(_order(options, calls - call, calls), call - run.begin + 1)
        logs = -path.lambdas[call + 1 - order : call + 2][::-1]
        update[call, 0] = path.alpha[call + 1] / path.alpha[call]
        update[call, [1, *range(3, 2 + order)]] = path.alpha[call + 1] * _integrals(logs[1:], logs[0])
    noise = predicted(options, path, data=False)
    return Draft(timesteps, update=update, levels=path.levels(), **noise._asdict()).begun(run.begin)


def _order(options: DEISOptions, left: int, calls: int) -> int:
    """The order with ``left`` calls to go, this one included."""
    if options.lower_order_final and calls < FEW_STEPS:
        return min(options.solver_order, left)
    return options.solver_order


def _integrals(known: F64, target: float) -> F64:
    """Integrals over rho, from ``known[0]`` to ``target``, of the Lagrange polynomials of ln(rho), [order].

    Since d(rho) = exp(u) du, an antiderivative of p(u) exp(u) is (p - p' + p'') exp(u).
    """
    weights = np.empty(len(known))
    for index, own in enumerate(known):
        others = np.delete(known, index)
        basis = Polynomial(polyfromroots(others - known[0]))
        whole = basis - basis.deriv() + basis.deriv(2)
        # Counted from known[0], so that nothing large cancels.
        integral = np.exp(target) * whole(target - known[0]) - np.exp(known[0]) * whole(0.0)
        weights[index] = integral / np.prod(own - others)
    return weights
