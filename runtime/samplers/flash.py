"""The sampler of Kandinsky Flash, which was distilled to a few clean samples, one after the other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from allaprima.bundle.errors import RequestError
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

_FIRST = 979  # of 1000 timesteps, where the model was distilled to begin


@dataclass(frozen=True)
class FlashOptions(Training):
    """The fields that all configurations share, with the schedule that the model was trained on."""

    sampler: ClassVar[str] = "flash"

    beta_schedule: str = "squaredcos_cap_v2"


def flash(config: Mapping[str, Any], run: Run) -> Draft:
    """Clean samples as the model sees them, each with fresh noise put back on it for the next call.

    The sampler of Kandinsky 3.1 Flash in its authors' code: LCM without its skip connection, on timesteps of
    its own. Nothing is clamped.
    """
    options = read_options(FlashOptions, config)
    require(options, "prediction_type", *PREDICTIONS)
    table = training_alphas(options).astype(np.float64)
    listed = _spaced(options, run.steps) if run.timesteps is None else run.timesteps
    timesteps = training_indices(listed, options)
    a = table[timesteps]
    p = np.append(a[1:], 1.0)
    return Draft(
        timesteps.astype(np.float64),
        denoised(options.prediction_type, np.sqrt(a), np.sqrt(1 - a)),
        np.stack([np.zeros(run.steps), np.sqrt(p), np.sqrt(1 - p)], axis=1),
        draws=np.arange(run.steps) < run.steps - 1,
        levels=np.sqrt(np.stack([a, 1 - a], axis=1)),
    )


def _spaced(options: Training, steps: int) -> NDArray[np.float64]:
    """979, 729, 479 and 229 for four steps of 1000."""
    total = options.num_train_timesteps
    first = _FIRST * total // 1000
    most = total // max(1, total - first)
    if steps > most:
        raise RequestError(
            f"num_inference_steps {steps} is out of range: sampler {options.sampler!r} takes 1 to {most}"
        )
    return np.asarray(first - np.arange(steps) * total // steps, np.float64)
