"""PNDM without its Runge-Kutta phase, that is PLMS: the default sampler of Stable Diffusion 1."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from allaprima.runtime.samplers.run import Run
from allaprima.runtime.samplers.table import Draft, clean_from_noise
from allaprima.runtime.schedule import (
    F64,
    Training,
    read_options,
    require,
    spaced_timesteps,
    training_alphas,
    training_indices,
)

_SLOTS = 4
# Adams-Bashforth weights at each call, over this output and the four kept ones, newest first. The second call
# repeats the first step with the mean of two outputs, and its own output does not count later.
_WARM_UP = np.array(
    [
        [1, 0, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0, 0],
        [3 / 2, 0, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 0, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, 0, -9 / 24],
    ]
)
_STEADY = np.array([55 / 24, -59 / 24, 37 / 24, -9 / 24, 0])


@dataclass(frozen=True)
class PNDMOptions(Training):
    """Fields and defaults of ``PNDMScheduler``."""

    sampler: ClassVar[str] = "pndm"

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False


def pndm(config: Mapping[str, Any], run: Run) -> Draft:
    """Liu et al. 2022, equation 9 with linear multistep outputs; N + 1 calls for N > 1 steps.

    The second call starts again from the first sample. No slot holds that, but the first call was
    ``next = c * sample + d * output``, so it is ``(next - d * output) / c`` with the output from the history.
    """
    options = read_options(PNDMOptions, config)
    require(options, "prediction_type", "epsilon", "v_prediction")
    require(options, "skip_prk_steps", True)
    listed = training_indices(spaced_timesteps(options, run.steps), options)
    stride = options.num_train_timesteps // run.steps
    # Begun in the middle, no timestep is there twice, and every call but the first is one step out of phase.
    repeated = np.concatenate([listed[:2], listed[1:2], listed[2:]])[run.begin :]
    start, end = repeated.copy(), repeated - stride
    if len(repeated) > 1:
        start[1], end[1] = repeated[1] + stride, repeated[1]
    sample, output = _transfer(options, start, end)
    update = np.zeros((len(repeated), 3 + _SLOTS))
    weights = np.concatenate([_WARM_UP, np.tile(_STEADY, (max(len(repeated) - len(_WARM_UP), 0), 1))])
    update[:, 0] = sample
    update[:, [1, 3, 4, 5, 6]] = output[:, None] * weights[: len(repeated)]
    if len(repeated) > 1:
        update[1, 0] = sample[1] / sample[0]
        update[1, 3] -= sample[1] / sample[0] * output[0]
    a = training_alphas(options).astype(np.float64)[repeated]
    outputs = np.tile([0.0, 1.0], (len(repeated), 1))
    return Draft(
        repeated.astype(np.float64),
        outputs,
        update,
        levels=np.sqrt(np.stack([a, 1 - a], axis=1)),
        clean=_clean(options, a, _alphas(options, end)),
    )


def _clean(options: PNDMOptions, called: F64, reached: F64) -> F64:
    """`Draft.clean`, for cumulative products of alpha where the model is called and after that, [N] each."""
    alpha, sigma = np.sqrt(reached), np.sqrt(1 - reached)
    if options.prediction_type == "epsilon":
        return clean_from_noise(alpha, sigma)
    # The output is v of the call, of which both samples are turned away by an angle: two equations.
    share = np.sqrt(called) * alpha + np.sqrt(1 - called) * sigma
    return np.stack([np.sqrt(called) / share, -sigma / share], axis=1)


def _transfer(options: PNDMOptions, start: NDArray[np.int64], end: NDArray[np.int64]) -> tuple[F64, F64]:
    """Coefficients [N] of sample and model output in the deterministic step between two timesteps."""
    table = training_alphas(options).astype(np.float64)
    a, p = table[training_indices(start, options)], _alphas(options, end)
    sample = np.sqrt(p / a)
    epsilon = -(p - a) / (a * np.sqrt(1 - p) + np.sqrt(a * (1 - a) * p))
    if options.prediction_type == "epsilon":
        return sample, epsilon
    return sample + epsilon * np.sqrt(1 - a), epsilon * np.sqrt(a)


def _alphas(options: PNDMOptions, end: NDArray[np.int64]) -> F64:
    """The cumulative products of alpha at timesteps, of which those below 0 are the end, [N]."""
    table = training_alphas(options).astype(np.float64)
    final = 1.0 if options.set_alpha_to_one else table[0]
    return np.where(end >= 0, table[np.maximum(end, 0)], final)
