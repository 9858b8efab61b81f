"""What the samplers of Karras' family share: schedules, and the sample ``clean + sigma * noise``.

The UNet gets that sample divided by ``sqrt(sigma**2 + 1)``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allaprima.runtime.respacing import Respacing, respaced
from allaprima.runtime.samplers.limit import UNLIMITED, Limit
from allaprima.runtime.samplers.run import Run
from allaprima.runtime.samplers.table import Draft, denoised
from allaprima.runtime.schedule import (
    F32,
    F64,
    Training,
    refuse_custom,
    sigmas_of,
    spaced_timesteps,
    timesteps_of,
    training_alphas,
)


@dataclass(frozen=True)
class SigmaOptions(Respacing):
    """The fields that ``HeunDiscrete``, ``LMSDiscrete`` and both ``KDPM2`` schedulers share."""

    timestep_spacing: str = "linspace"


def listed_sigmas(options: Training, table: F32, run: Run) -> tuple[F64, F64]:
    """Timesteps by their spacing, or those that the run gives, and their sigmas, [N] each."""
    timesteps = spaced_timesteps(options, run.steps) if run.timesteps is None else run.timesteps
    # diffusers keeps these timesteps in float32.
    return timesteps, np.interp(timesteps.astype(np.float32), np.arange(len(table)), table)


def sigma_schedule(options: Respacing, table: F32, run: Run) -> tuple[F64, F64]:
    """Timesteps and sigmas [N] of an increasing training ``table`` of sigmas [T], before the last one."""
    refuse_custom(run.timesteps is not None and options.rule, options.sampler, "timesteps")
    timesteps, sigmas = listed_sigmas(options, table, run)
    spaced = respaced(options, float(sigmas[-1]), float(sigmas[0]), run.steps)
    return (timesteps, sigmas) if spaced is None else (timesteps_of(spaced, table), spaced)


def training_sigmas(options: Training, *, zero_snr: bool = False) -> F32:
    """The sigmas of training, ascending, float32 [T]."""
    return sigmas_of(training_alphas(options, zero_snr=zero_snr, positive=True))


def closed(sigmas: F64, last: float = 0.0) -> F64:
    """Append the last sigma and round as diffusers does, which keeps its schedule in float32."""
    return np.append(sigmas, last).astype(np.float32).astype(np.float64)


def interleaved(outer: F64, inner: F64) -> F64:
    """Outer, inner, outer, ..., outer: [N] and [N - 1] to [2N - 1]."""
    merged = np.empty(len(outer) + len(inner))
    merged[::2], merged[1::2] = outer, inner
    return merged


def clean(prediction_type: str, sigmas: F64) -> F64:
    """Coefficients [N, 2] of the clean sample over the sample in sigma space and the model's output."""
    scale = 1 / np.sqrt(sigmas**2 + 1)
    prediction = denoised(prediction_type, scale, sigmas * scale)
    prediction[:, 0] *= scale  # from sigma space to the variance-preserving sample
    return prediction


def sigma_draft(
    options: Training,
    timesteps: F64,
    sigmas: F64,
    update: F64,
    *,
    prediction: F64 | None = None,
    limit: Limit = UNLIMITED,
    draws: NDArray[np.bool_] | bool = False,
    calls: int = 1,
) -> Draft:
    """The table of calls at ``sigmas`` [N]; the prediction is the clean sample if none is given."""
    if prediction is None:
        prediction = clean(options.prediction_type, sigmas)
    highest = float(sigmas.max())
    initial = highest if options.timestep_spacing in ("linspace", "trailing") else float(np.hypot(highest, 1))
    scale = 1 / np.sqrt(sigmas**2 + 1)
    levels = np.stack([np.ones(len(sigmas)), sigmas], axis=1)
    return Draft(timesteps, prediction, update, scale, limit, draws, initial, levels, calls)
