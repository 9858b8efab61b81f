"""DPM-Solver++, multistep, orders 1 to 3, ODE and SDE (Lu et al. 2022, arXiv 2211.01095).

alpha and sigma are those of the variance-preserving sample, lambda = ln(alpha / sigma).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from allaprima.bundle.errors import RequestError
from allaprima.runtime.samplers.table import Draft, denoised
from allaprima.runtime.schedule import (
    F32,
    F64,
    PREDICTIONS,
    SPACINGS,
    Training,
    exponential_sigmas,
    karras_sigmas,
    read_options,
    require,
    sigmas_of,
    timesteps_of,
    trailing_timesteps,
    training_alphas,
    training_indices,
)

_FEW_STEPS = 15  # below this, lower_order_final applies


@dataclass(frozen=True)
class DPMOptions(Training):
    """Fields and defaults of ``DPMSolverMultistepScheduler``.

    ``sigma_min`` and ``sigma_max`` are no parameters of that class, but it reads them where the configuration
    of another scheduler left them.
    """

    sampler: ClassVar[str] = "dpmpp_2m"

    timestep_spacing: str = "linspace"
    solver_order: int = 2
    thresholding: bool = False
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    use_lu_lambdas: bool | None = False
    use_flow_sigmas: bool | None = False
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -math.inf
    variance_type: str | None = None
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None


def dpm(config: Mapping[str, Any], steps: int) -> Draft:
    """The data-prediction solver of the paper; noise at every call if ``algorithm_type`` is the SDE."""
    options = read_options(DPMOptions, config)
    _check(options)
    timesteps, sigmas = _schedule(options, steps)
    scale = 1 / np.sqrt(sigmas**2 + 1)
    calls = len(timesteps)
    update = np.zeros((calls, 3 + options.solver_order - 1))
    for call in range(calls):
        order = min(_order(options, call, calls), call + 1)
        row = _row(options, sigmas[call + 1 - order : call + 2], order)
        update[call, : len(row)] = row
    prediction = denoised(options.prediction_type, scale[:-1], (sigmas * scale)[:-1])
    return Draft(timesteps, prediction, update, draws=options.algorithm_type.startswith("sde"))


def _check(options: DPMOptions) -> None:
    require(options, "prediction_type", *PREDICTIONS)
    require(options, "timestep_spacing", *SPACINGS)
    require(options, "solver_order", 1, 2, 3)
    require(options, "algorithm_type", "dpmsolver++", "sde-dpmsolver++")
    # Those of DEIS and UniPC stand for "midpoint" in diffusers, so that configurations can cross over.
    require(options, "solver_type", "midpoint", "heun", "logrho", "bh1", "bh2")
    require(options, "final_sigmas_type", "zero", "sigma_min")
    for name in ("thresholding", "use_beta_sigmas", "use_flow_sigmas", "use_dynamic_shifting"):
        require(options, name, False, None)
    if options.variance_type in ("learned", "learned_range"):
        require(options, "variance_type", None, "fixed_small", "fixed_large")


def _order(options: DPMOptions, call: int, calls: int) -> int:
    """The order at this call, apart from the history being short at the start."""
    few = options.lower_order_final and calls < _FEW_STEPS
    if call == calls - 1 and (options.euler_at_final or few or options.final_sigmas_type == "zero"):
        return 1
    return min(options.solver_order, 2) if call == calls - 2 and few else options.solver_order


def _row(options: DPMOptions, sigmas: F64, order: int) -> F64:
    """One row of the update, from the ``order + 1`` sigmas that it spans, in descending order.

    The derivatives of the prediction are written over (m0, m1, m2), newest first. The ODE and the SDE share
    their formulas if the span of lambda counts double in the SDE.
    """
    log = [-math.log(sigma) if sigma > 0 else math.inf for sigma in sigmas]
    h = log[-1] - log[-2]
    alpha, sigma = 1 / math.hypot(sigmas[-1], 1), sigmas[-1] / math.hypot(sigmas[-1], 1)
    ratio = sigma * math.hypot(sigmas[-2], 1) / sigmas[-2]
    sde = options.algorithm_type.startswith("sde")
    span = 2 * h if sde else h
    gain = -math.expm1(-span)
    weights = np.array([alpha * gain, 0, 0])
    if order > 1:
        first = np.array([1, -1, 0]) / (log[-2] - log[-3])
        slope = 1 - (gain / span if span else 1)
        if order == 2:
            weights += alpha * h * (slope if options.solver_type == "heun" else gain / 2) * first
        else:
            second = np.array([0, 1, -1]) / (log[-3] - log[-4])
            bend = (first - second) / (log[-2] - log[-4])
            weights += alpha * h * slope * (first + (log[-2] - log[-3]) * bend)
            # With -1/2 this vanishes with the span, as it should; diffusers adds 1/2 for the SDE, so we do.
            curve = (span - gain) / span**2 + (0.5 if sde else -0.5) if span else 0
            weights -= alpha * h**2 * curve * bend
    noise = sigma * math.sqrt(max(gain, 0)) if sde else 0.0
    return np.array([ratio * math.exp(-h) if sde else ratio, weights[0], noise, *weights[1:order]])


def _schedule(options: DPMOptions, steps: int) -> tuple[F64, F64]:
    """Timesteps [N] and sigmas [N + 1] of ``DPMSolverMultistepScheduler.set_timesteps``."""
    alphas = training_alphas(options, zero_snr=options.rescale_betas_zero_snr, positive=True)
    table = sigmas_of(alphas)
    names = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas")
    chosen = [name for name in names if getattr(options, name)]
    if "use_karras_sigmas" in chosen and "use_exponential_sigmas" in chosen:
        raise RequestError(
            "scheduler options use_karras_sigmas and use_exponential_sigmas exclude each other"
        )
    if chosen:
        timesteps, sigmas = _respaced(options, chosen[0], table, steps)
    else:
        timesteps = _listed(options, alphas, steps)
        sigmas = np.interp(timesteps, np.arange(len(table)), table)
    last = 0.0 if options.final_sigmas_type == "zero" else float(table[0])
    # Rounded as diffusers does, which keeps its schedule in float32 and its timesteps in integers.
    return np.trunc(timesteps), np.append(sigmas, last).astype(np.float32).astype(np.float64)


def _respaced(options: DPMOptions, how: str, table: F32, steps: int) -> tuple[F64, F64]:
    low, high = float(table[0]), float(table[-1])
    if how != "use_lu_lambdas":
        low = low if options.sigma_min is None else options.sigma_min
        high = high if options.sigma_max is None else options.sigma_max
    # Lu's uniform lambdas are the exponential sigmas, but for the rounding of their timesteps.
    sigmas = (karras_sigmas if how == "use_karras_sigmas" else exponential_sigmas)(low, high, steps)
    timesteps = timesteps_of(sigmas, table)
    if how != "use_exponential_sigmas" and options.beta_schedule != "squaredcos_cap_v2":
        timesteps = np.round(timesteps)
    return timesteps, sigmas


def _listed(options: DPMOptions, alphas: F32, steps: int) -> F64:
    """Timesteps by ``timestep_spacing``: one more than asked for, of which the last is left out."""
    lambdas = np.log(np.sqrt(alphas)) - np.log(np.sqrt(np.float32(1) - alphas))
    last = options.num_train_timesteps - int(np.searchsorted(lambdas[::-1], options.lambda_min_clipped))
    if options.timestep_spacing == "linspace":
        timesteps = np.round(np.linspace(0, last - 1, steps + 1))[:0:-1]
    elif options.timestep_spacing == "leading":
        timesteps = np.arange(steps, 0, -1, dtype=np.float64) * (last // (steps + 1)) + options.steps_offset
    else:
        timesteps = trailing_timesteps(last, options.num_train_timesteps / steps)
    return training_indices(timesteps, options).astype(np.float64)
