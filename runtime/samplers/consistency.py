"""Samplers of distilled models: LCM (Luo et al. 2023) and TCD (Zheng et al. 2024)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from allaprima.bundle.errors import RequestError
from allaprima.runtime.samplers.limit import Clipping
from allaprima.runtime.samplers.run import Run
from allaprima.runtime.samplers.table import Draft, denoised
from allaprima.runtime.schedule import (
    PREDICTIONS,
    Training,
    read_options,
    require,
    training_alphas,
    training_indices,
)

_SIGMA_DATA = 0.5  # Song et al. 2023, appendix C


@dataclass(frozen=True)
class TCDOptions(Training):
    """Fields and defaults of ``TCDScheduler`` that change a result; the clamp it declares does not."""

    sampler: ClassVar[str] = "tcd"

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    original_inference_steps: int = 50
    rescale_betas_zero_snr: bool = False


@dataclass(frozen=True)
class LCMOptions(TCDOptions, Clipping):
    """Fields and defaults of ``LCMScheduler`` that change a result."""

    sampler: ClassVar[str] = "lcm"

    clip_sample: bool = False
    timestep_scaling: float = 10.0


def lcm(config: Mapping[str, Any], run: Run) -> Draft:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3): a clean sample, then noise put back."""
    options = read_options(LCMOptions, config)
    timesteps, table = _schedule(options, run)
    a, p = table[timesteps], np.append(table[timesteps[1:]], 1.0)
    time = timesteps * options.timestep_scaling
    skip = _SIGMA_DATA**2 / (time**2 + _SIGMA_DATA**2)
    out = time / np.sqrt(time**2 + _SIGMA_DATA**2)
    return Draft(
        timesteps.astype(np.float64),
        denoised(options.prediction_type, np.sqrt(a), np.sqrt(1 - a)),
        np.stack([np.sqrt(p) * skip, np.sqrt(p) * out, np.sqrt(1 - p)], axis=1),
        limit=options.limit,
        draws=np.arange(run.steps) < run.steps - 1,
        levels=np.sqrt(np.stack([a, 1 - a], axis=1)),
    )


def tcd(config: Mapping[str, Any], run: Run) -> Draft:
    """Strategic stochastic sampling (Zheng et al. 2024, algorithm 4), gamma = ``run.eta``.

    A DDIM step beyond the next timestep, to ``(1 - gamma)`` of it, then noise back up to it.
    """
    options = read_options(TCDOptions, config)
    timesteps, table = _schedule(options, run)
    after = np.append(timesteps[1:], 0)
    # PyTorch multiplies in float32, which decides some of these roundings.
    below = np.floor(np.float32(1 - run.eta) * after.astype(np.float32)).astype(np.int64)
    a, p, s = table[timesteps], table[after], table[below]
    direction = np.sqrt((1 - s) / (1 - a))
    update = np.stack([direction, np.sqrt(s) - direction * np.sqrt(a), np.zeros(run.steps)], axis=1)
    fresh = np.arange(run.steps) < (run.steps - 1 if run.eta > 0 else 0)
    back = np.where(fresh, p / s, 1.0)
    update = update * np.sqrt(back)[:, None]
    update[:, 2] = np.sqrt(np.maximum(1 - back, 0))
    prediction = denoised(options.prediction_type, np.sqrt(a), np.sqrt(1 - a))
    levels = np.sqrt(np.stack([a, 1 - a], axis=1))
    return Draft(timesteps.astype(np.float64), prediction, update, draws=fresh, levels=levels)


def _schedule(options: TCDOptions, run: Run) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Timesteps [N], a selection of those that the model was distilled on, and the table of alphas."""
    require(options, "prediction_type", *PREDICTIONS)
    table = training_alphas(options, zero_snr=options.rescale_betas_zero_snr).astype(np.float64)
    if run.timesteps is not None:
        return training_indices(run.timesteps, options), table
    origin, total = options.original_inference_steps, options.num_train_timesteps
    if not 1 <= origin <= total:
        raise RequestError(
            f"scheduler option original_inference_steps={origin} is out of range: give one from 1 to {total}"
        )
    if run.steps > origin:
        raise RequestError(
            f"num_inference_steps {run.steps} is out of range: sampler {options.sampler!r} takes 1 to"
            f" {origin}, the original_inference_steps of this model"
        )
    listed = (np.arange(origin, 0, -1) * (total // origin)) - 1
    chosen = np.floor(np.linspace(0, origin, run.steps, endpoint=False)).astype(np.int64)
    return listed[chosen], table
