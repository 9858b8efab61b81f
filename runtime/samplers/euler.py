"""Euler's method on the probability-flow ODE, and its ancestral form (as in K. Crowson's k-diffusion).

The sample of these two lives in sigma space, ``clean + sigma * noise``; the UNet gets it divided by
``sqrt(sigma**2 + 1)``.
"""

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
    Training,
    exponential_sigmas,
    karras_sigmas,
    read_options,
    require,
    sigmas_of,
    spaced_timesteps,
    timesteps_of,
    training_alphas,
)


@dataclass(frozen=True)
class AncestralOptions(Training):
    """Fields and defaults of ``EulerAncestralDiscreteScheduler``."""

    sampler: ClassVar[str] = "euler_a"

    timestep_spacing: str = "linspace"
    rescale_betas_zero_snr: bool = False


@dataclass(frozen=True)
class EulerOptions(AncestralOptions):
    """Fields and defaults of ``EulerDiscreteScheduler``."""

    sampler: ClassVar[str] = "euler"

    interpolation_type: str = "linear"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: str = "discrete"
    final_sigmas_type: str = "zero"


def euler(config: Mapping[str, Any], steps: int) -> Draft:
    """Karras et al. 2022, algorithm 1 without its second-order correction and without churn."""
    options = read_options(EulerOptions, config)
    require(options, "prediction_type", *PREDICTIONS, "original_sample")
    require(options, "interpolation_type", "linear")
    require(options, "use_beta_sigmas", False, None)
    require(options, "timestep_type", "discrete", "continuous")
    require(options, "final_sigmas_type", "zero", "sigma_min")
    timesteps, sigmas = _schedule(options, steps)
    now, after = sigmas[:-1], sigmas[1:]
    update = np.stack([after / now, 1 - after / now, np.zeros(len(now))], axis=1)
    return _draft(options, timesteps, now, update)


def euler_ancestral(config: Mapping[str, Any], steps: int) -> Draft:
    """A step to below the next sigma, then noise up to it; drawn at every call, also the last."""
    options = read_options(AncestralOptions, config)
    require(options, "prediction_type", "epsilon", "v_prediction")
    table = _training_sigmas(options)
    timesteps = spaced_timesteps(options, steps)
    sigmas = _closed(_at(table, timesteps), 0.0)
    now, after = sigmas[:-1], sigmas[1:]
    up = np.sqrt(after**2 * (now**2 - after**2) / now**2)
    down = np.sqrt(after**2 - up**2)
    update = np.stack([down / now, 1 - down / now, up], axis=1)
    return _draft(options, timesteps, now, update, draws=True)


def _schedule(options: EulerOptions, steps: int) -> tuple[F64, F64]:
    """Timesteps [N] and sigmas [N + 1] of ``EulerDiscreteScheduler.set_timesteps``."""
    table = _training_sigmas(options)
    timesteps = spaced_timesteps(options, steps)
    sigmas = _at(table, timesteps)
    if options.use_karras_sigmas and options.use_exponential_sigmas:
        raise RequestError(
            "scheduler options use_karras_sigmas and use_exponential_sigmas exclude each other"
        )
    if options.use_karras_sigmas or options.use_exponential_sigmas:
        respace = karras_sigmas if options.use_karras_sigmas else exponential_sigmas
        low = float(sigmas[-1]) if options.sigma_min is None else options.sigma_min
        high = float(sigmas[0]) if options.sigma_max is None else options.sigma_max
        sigmas = respace(low, high, steps)
        timesteps = timesteps_of(sigmas, table)
    sigmas = _closed(sigmas, 0.0 if options.final_sigmas_type == "zero" else float(table[0]))
    if options.timestep_type == "continuous" and options.prediction_type == "v_prediction":
        timesteps = 0.25 * np.log(sigmas[:-1])  # c_noise of Karras et al., table 1
    return timesteps, sigmas


def _training_sigmas(options: AncestralOptions) -> F32:
    return sigmas_of(training_alphas(options, zero_snr=options.rescale_betas_zero_snr, positive=True))


def _at(table: F32, timesteps: F64) -> F64:
    """The training sigmas at timesteps that diffusers keeps in float32."""
    return np.interp(timesteps.astype(np.float32), np.arange(len(table)), table)


def _closed(sigmas: F64, last: float) -> F64:
    """Append the last sigma and round as diffusers does, which keeps its schedule in float32."""
    return np.append(sigmas, last).astype(np.float32).astype(np.float64)


def _draft(
    options: AncestralOptions, timesteps: F64, sigmas: F64, update: F64, *, draws: bool = False
) -> Draft:
    scale = 1 / np.sqrt(sigmas**2 + 1)
    prediction = denoised(options.prediction_type, scale, sigmas * scale)
    prediction[:, 0] *= scale  # from sigma space to the variance-preserving sample
    highest = float(sigmas.max())
    initial = highest if options.timestep_spacing in ("linspace", "trailing") else float(np.hypot(highest, 1))
    return Draft(timesteps, prediction, update, input_scale=scale, draws=draws, init_noise_sigma=initial)
