"""Solvers of second order that call the model twice a step: Heun, DPM2 and DPM2 ancestral.

In sigma space, with the slope ``d = (sample - clean) / sigma`` of the ODE. Each step is two rows; the second
starts again from the sample before the first.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from allaprima.runtime.samplers.euler import ancestral
from allaprima.runtime.samplers.limit import UNLIMITED, clip
from allaprima.runtime.samplers.recall import NOISE, PREDICTION, SAMPLE, carried, past
from allaprima.runtime.samplers.run import Run
from allaprima.runtime.samplers.sigma_space import (
    SigmaOptions,
    closed,
    interleaved,
    sigma_draft,
    sigma_schedule,
    training_sigmas,
)
from allaprima.runtime.samplers.table import Draft
from allaprima.runtime.schedule import F32, F64, PREDICTIONS, read_options, require, timesteps_of


@dataclass(frozen=True)
class HeunOptions(SigmaOptions):
    """Fields and defaults of ``HeunDiscreteScheduler``."""

    sampler: ClassVar[str] = "heun"
    beta_schedules: ClassVar[tuple[str, ...]] = ("linear", "scaled_linear", "squaredcos_cap_v2", "exp")

    beta_start: float = 0.00085
    beta_end: float = 0.012
    clip_sample: bool = False
    clip_sample_range: float = 1.0


@dataclass(frozen=True)
class KDPM2Options(SigmaOptions):
    """Fields and defaults of ``KDPM2DiscreteScheduler`` and ``KDPM2AncestralDiscreteScheduler``."""

    sampler: ClassVar[str] = "dpm2"

    beta_start: float = 0.00085
    beta_end: float = 0.012


def heun(config: Mapping[str, Any], run: Run) -> Draft:
    """Karras et al. 2022, algorithm 1: the trapezoidal rule, Euler's method to the last sigma of 0."""
    options = read_options(HeunOptions, config)
    require(options, "prediction_type", *PREDICTIONS)
    timesteps, sigmas = sigma_schedule(options, training_sigmas(options), run)
    sigmas = closed(sigmas)
    rows = []
    for now, after in itertools.pairwise(sigmas[:-1]):
        first = _euler(now, after)
        start = carried(SAMPLE, first)
        slopes = (start - past(1)) / now + (SAMPLE - PREDICTION) / after
        rows += [first, start + (after - now) / 2 * slopes]
    rows.append(PREDICTION)
    return sigma_draft(
        options,
        np.append(timesteps[:1], np.repeat(timesteps[1:], 2)),
        np.append(sigmas[:1], np.repeat(sigmas[1:-1], 2)),
        np.stack(rows)[:, :4],
        limit=clip(options.clip_sample_range) if options.clip_sample else UNLIMITED,
        calls=2,
    )


def kdpm2(config: Mapping[str, Any], run: Run) -> Draft:
    """DPM-Solver-2 (Lu et al. 2022, algorithm 1) in sigma space: the slope half way in log sigma."""
    options, timesteps, sigmas, table = _kdpm2_schedule(config, run)
    middle = np.exp(np.log(sigmas[:-2] * sigmas[1:-1]) / 2)
    return _midpoint(options, timesteps, sigmas, middle, sigmas[1:-1], None, timesteps_of(middle, table))


def kdpm2_ancestral(config: Mapping[str, Any], run: Run) -> Draft:
    """DPM2 to below the next sigma, then noise up to it; none at the last call."""
    options, timesteps, sigmas, table = _kdpm2_schedule(config, run)
    up, down = ancestral(sigmas[:-2], sigmas[1:-1])
    middle = np.exp(np.log(sigmas[:-2] * down) / 2)
    return _midpoint(options, timesteps, sigmas, middle, down, up, timesteps_of(middle, table))


def _kdpm2_schedule(config: Mapping[str, Any], run: Run) -> tuple[KDPM2Options, F64, F64, F32]:
    options = read_options(KDPM2Options, config)
    require(options, "prediction_type", "epsilon", "v_prediction")
    table = training_sigmas(options)
    timesteps, sigmas = sigma_schedule(options, table, run)
    if options.rule == "use_karras_sigmas":
        timesteps = np.round(timesteps)
    return options, timesteps, closed(sigmas), table


def _midpoint(
    options: KDPM2Options,
    timesteps: F64,
    sigmas: F64,
    middle: F64,
    target: F64,
    up: F64 | None,
    between: F64,
) -> Draft:
    """Two rows for each step but the last: to ``middle``, then from the start with the slope found there."""
    rows = []
    for step, now in enumerate(sigmas[:-2]):
        first = _euler(now, middle[step])
        slope = (SAMPLE - PREDICTION) / middle[step]
        second = carried(SAMPLE, first) + (target[step] - now) * slope
        rows += [first, second if up is None else second + up[step] * NOISE]
    rows.append(PREDICTION)
    calls = len(rows)
    return sigma_draft(
        options,
        interleaved(timesteps, between),
        interleaved(sigmas[:-1], middle),
        np.stack(rows)[:, :4],
        draws=np.arange(calls) % 2 == 1 if up is not None else False,
        calls=2,
    )


def _euler(now: float, after: float) -> F64:
    """The row of Euler's method."""
    return after / now * SAMPLE + (1 - after / now) * PREDICTION
