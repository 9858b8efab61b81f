"""What the exponential integrators share: DPM-Solver, DEIS and UniPC.

The sample is ``alpha * clean + sigma * noise``, and lambda = ln(alpha / sigma) is their time.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from allaprima.bundle.errors import RequestError
from allaprima.runtime.respacing import Respacing, respaced
from allaprima.runtime.samplers.limit import UNLIMITED, Limit, Thresholding
from allaprima.runtime.samplers.run import Run
from allaprima.runtime.samplers.table import clean_from_noise, denoised
from allaprima.runtime.schedule import (
    F32,
    F64,
    PREDICTIONS,
    SPACINGS,
    exponential_sigmas,
    refuse_custom,
    require,
    sigmas_of,
    timesteps_of,
    trailing_timesteps,
    training_alphas,
    training_indices,
)

FEW_STEPS = 15  # below this, lower_order_final applies


@dataclass(frozen=True)
class LambdaOptions(Respacing, Thresholding):
    """The fields that these samplers share."""

    timestep_spacing: str = "linspace"
    solver_order: int = 2
    lower_order_final: bool = True
    use_flow_sigmas: bool | None = False
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False


class Path(NamedTuple):
    """Where the sample passes: at each call and at the end, [N + 1] each."""

    sigmas: F64
    """As diffusers keeps them: sigma / alpha, or the flow's time from 1 to 0."""
    alpha: F64
    sigma: F64
    lambdas: F64
    """Ascending, infinite where sigma is 0."""

    def levels(self) -> F64:
        """How much of the clean sample and of noise is in the sample before each call, [N, 2]."""
        return np.stack([self.alpha[:-1], self.sigma[:-1]], axis=1)

    def clean_from_noise(self) -> F64:
        """The clean sample after each call, of a prediction that is the noise: `Draft.clean`, [N, 2]."""
        return clean_from_noise(self.alpha[1:], self.sigma[1:])


def check(options: LambdaOptions) -> None:
    """Refuse what none of these samplers can honour."""
    require(options, "prediction_type", *PREDICTIONS, "flow_prediction")
    require(options, "timestep_spacing", *SPACINGS)
    require(options, "solver_order", 1, 2, 3)
    require(options, "use_dynamic_shifting", False)
    if options.use_flow_sigmas and options.rule:
        raise RequestError(
            f"scheduler options use_flow_sigmas and {options.rule} exclude each other: set one to false"
        )


def training_table(options: LambdaOptions, *, zero_snr: bool = False) -> F32:
    """The sigmas of training, ascending, float32 [T]."""
    return sigmas_of(training_alphas(options, zero_snr=zero_snr, positive=True))


def lambda_schedule(
    options: LambdaOptions,
    run: Run,
    *,
    zero_snr: bool = False,
    rounded: bool = True,
    uniform: bool = False,
    clip: float = -math.inf,
) -> tuple[F64, F64]:
    """Timesteps, whole numbers, and sigmas before the last one, [N] each.

    Args:
        options: of the sampler.
        run: custom timesteps are honoured; refuse them before if the sampler of diffusers does.
        zero_snr: whether the betas are rescaled to end in pure noise.
        rounded: whether Karras' timesteps are rounded, not cut.
        uniform: whether the lambdas are to be uniform (Lu et al. 2022).
        clip: the least lambda to begin with.
    """
    alphas = training_alphas(options, zero_snr=zero_snr, positive=True)
    table = sigmas_of(alphas)
    reason = "use_lu_lambdas" if uniform else options.rule
    refuse_custom(run.timesteps is not None and reason, options.sampler, "timesteps")
    sigmas = respaced(options, float(table[0]), float(table[-1]), run.steps)
    if sigmas is None and uniform:
        sigmas = exponential_sigmas(float(table[0]), float(table[-1]), run.steps)
    if sigmas is not None:
        timesteps = timesteps_of(sigmas, table)
        rounds = rounded and reason in ("use_karras_sigmas", "use_lu_lambdas")
        return np.trunc(np.round(timesteps) if rounds else timesteps), sigmas
    if run.timesteps is not None:
        timesteps = training_indices(run.timesteps, options).astype(np.float64)
    else:
        timesteps = _listed(options, alphas, run.steps, clip)
    return timesteps, np.interp(timesteps, np.arange(len(table)), table)


def flow_sigmas(options: LambdaOptions, steps: int) -> F64:
    """Shifted times of a flow, evenly from almost 1 to almost 0, [N]; 1000 times them are the timesteps."""
    times = 1 - np.linspace(1, 1 / options.num_train_timesteps, steps + 1)[:0:-1]
    return options.flow_shift * times / (1 + (options.flow_shift - 1) * times)


def path_of(options: LambdaOptions, sigmas: F64, last: float) -> Path:
    """The path through ``sigmas`` [N] to the ``last``, rounded to float32 as diffusers keeps them."""
    closed = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    with np.errstate(divide="ignore"):
        if options.use_flow_sigmas:
            return Path(closed, 1 - closed, closed, np.log1p(-closed) - np.log(closed))
        alpha = 1 / np.hypot(closed, 1)
        return Path(closed, alpha, closed * alpha, -np.log(closed))


def clean_of(options: LambdaOptions, path: Path) -> F64:
    """Coefficients [N, 2] of the clean sample over the sample and the model's output."""
    if options.prediction_type == "flow_prediction":
        return np.stack([np.ones(len(path.sigmas) - 1), -path.sigmas[:-1]], axis=1)
    return denoised(options.prediction_type, path.alpha[:-1], path.sigma[:-1])


def noise_of(options: LambdaOptions, path: Path) -> F64:
    """Coefficients [N, 2] of the noise over the sample and the model's output."""
    if options.prediction_type == "epsilon":
        return np.tile([0.0, 1.0], (len(path.sigmas) - 1, 1))
    alpha, sigma = path.alpha[:-1, None], path.sigma[:-1, None]
    return (np.array([1.0, 0.0]) - alpha * clean_of(options, path)) / sigma


class Predicted(NamedTuple):
    """What a solver works on: the clean sample, or the noise. The fields are those of a draft."""

    to_prediction: F64
    limit: Limit = UNLIMITED
    from_limited: F64 | None = None
    clean: F64 | None = None


def predicted(options: LambdaOptions, path: Path, *, data: bool) -> Predicted:
    """The clean sample if ``data``, else the noise; thresholding acts on the clean sample in both cases."""
    if data:
        return Predicted(clean_of(options, path), options.limit)
    if options.limit == UNLIMITED:
        return Predicted(noise_of(options, path), clean=path.clean_from_noise())
    alpha, sigma = path.alpha[:-1], path.sigma[:-1]
    noise = np.stack([1 / sigma, -alpha / sigma], axis=1)
    return Predicted(clean_of(options, path), options.limit, noise, path.clean_from_noise())


def _listed(options: LambdaOptions, alphas: F32, steps: int, clip: float) -> F64:
    """Timesteps by ``timestep_spacing``: one more than asked for, of which the last is left out."""
    lambdas = np.log(np.sqrt(alphas)) - np.log(np.sqrt(np.float32(1) - alphas))
    last = options.num_train_timesteps - int(np.searchsorted(lambdas[::-1], clip))
    if options.timestep_spacing == "linspace":
        timesteps = np.round(np.linspace(0, last - 1, steps + 1))[:0:-1]
    elif options.timestep_spacing == "leading":
        timesteps = np.arange(steps, 0, -1, dtype=np.float64) * (last // (steps + 1)) + options.steps_offset
    else:
        timesteps = trailing_timesteps(last, options.num_train_timesteps / steps)
    return training_indices(timesteps, options).astype(np.float64)
