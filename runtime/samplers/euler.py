"""Euler's method on the probability-flow ODE, and its ancestral form (as in K. Crowson's k-diffusion)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from allaprima.runtime.samplers.run import Run
from allaprima.runtime.samplers.sigma_space import (
    SigmaOptions,
    clean,
    closed,
    listed_sigmas,
    sigma_draft,
    sigma_schedule,
    training_sigmas,
)
from allaprima.runtime.samplers.table import Draft
from allaprima.runtime.schedule import (
    F64,
    PREDICTIONS,
    Training,
    read_options,
    refuse_custom,
    require,
    timesteps_of,
)


@dataclass(frozen=True)
class AncestralOptions(Training):
    """Fields and defaults of ``EulerAncestralDiscreteScheduler``."""

    sampler: ClassVar[str] = "euler_a"

    timestep_spacing: str = "linspace"
    rescale_betas_zero_snr: bool = False


@dataclass(frozen=True)
class EulerOptions(SigmaOptions):
    """Fields and defaults of ``EulerDiscreteScheduler``."""

    sampler: ClassVar[str] = "euler"

    rescale_betas_zero_snr: bool = False
    interpolation_type: str = "linear"
    timestep_type: str = "discrete"
    final_sigmas_type: str = "zero"


def euler(config: Mapping[str, Any], run: Run) -> Draft:
    """Karras et al. 2022, algorithm 2 without its second-order correction.

    With churn diffusers differs from the paper: the model sees the sample before the noise is put in.
    """
    options = read_options(EulerOptions, config)
    require(options, "prediction_type", *PREDICTIONS, "original_sample")
    require(options, "interpolation_type", "linear")
    require(options, "timestep_type", "discrete", "continuous")
    require(options, "final_sigmas_type", "zero", "sigma_min")
    timesteps, sigmas = _schedule(options, run)
    now, after = sigmas[:-1], sigmas[1:]
    churn = run.churn
    most = min(churn.s_churn / len(now), math.sqrt(2) - 1)  # diffusers divides by len(sigmas) - 1
    gamma = np.where((now >= churn.s_tmin) & (now <= churn.s_tmax), most, 0.0)
    raised = now * (1 + gamma)
    fresh = churn.s_noise * np.sqrt(raised**2 - now**2)
    # In diffusers the clean sample is that of the raised one, here that of the one which the model saw.
    share = clean(options.prediction_type, now)[:, 0]
    ratio = after / raised
    update = np.stack([ratio, 1 - ratio, ratio * fresh + (1 - ratio) * share * fresh], axis=1)
    prediction = clean(options.prediction_type, now)
    if options.prediction_type == "epsilon":
        prediction[:, 1] = -raised
    return sigma_draft(options, timesteps, now, update, prediction=prediction, draws=gamma > 0)


def euler_ancestral(config: Mapping[str, Any], run: Run) -> Draft:
    """A step to below the next sigma, then noise up to it; drawn at every call, also the last."""
    options = read_options(AncestralOptions, config)
    require(options, "prediction_type", "epsilon", "v_prediction")
    table = training_sigmas(options, zero_snr=options.rescale_betas_zero_snr)
    timesteps, sigmas = listed_sigmas(options, table, run)
    sigmas = closed(sigmas)
    now, after = sigmas[:-1], sigmas[1:]
    up, down = ancestral(now, after)
    update = np.stack([down / now, 1 - down / now, up], axis=1)
    return sigma_draft(options, timesteps, now, update, draws=True)


def ancestral(now: F64, after: F64) -> tuple[F64, F64]:
    """Noise to add, and the sigma to reach before, for an ancestral step from ``now`` to ``after``, [N]."""
    return np.sqrt(after**2 * (now**2 - after**2) / now**2), after**2 / now


def _schedule(options: EulerOptions, run: Run) -> tuple[F64, F64]:
    """Timesteps [N] and sigmas [N + 1] of ``EulerDiscreteScheduler.set_timesteps``."""
    table = training_sigmas(options, zero_snr=options.rescale_betas_zero_snr)
    continuous = options.timestep_type == "continuous" and options.prediction_type == "v_prediction"
    if run.sigmas is not None:
        sigmas = run.sigmas.astype(np.float32).astype(np.float64)
        timesteps = timesteps_of(sigmas[:-1], table)
    else:
        refuse_custom(
            run.timesteps is not None and continuous and "timestep_type", options.sampler, "timesteps"
        )
        timesteps, sigmas = sigma_schedule(options, table, run)
        sigmas = closed(sigmas, 0.0 if options.final_sigmas_type == "zero" else float(table[0]))
    if continuous:
        timesteps = 0.25 * np.log(sigmas[:-1])  # c_noise of Karras et al., table 1
    return timesteps, sigmas
