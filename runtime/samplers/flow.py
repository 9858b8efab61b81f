"""Samplers of rectified flows: (1 - sigma) * clean + sigma * noise; the model gives noise - clean.

Liu et al. 2022 (arXiv 2209.03003), Esser et al. 2024 (arXiv 2403.03206) for the shift.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from allaprima.runtime.respacing import Respacing, respaced
from allaprima.runtime.samplers.recall import PREDICTION, SAMPLE, carried, past
from allaprima.runtime.samplers.run import Run
from allaprima.runtime.samplers.table import Draft
from allaprima.runtime.schedule import F64, Training, read_options, require


@dataclass(frozen=True)
class FlowHeunOptions(Training):
    """Fields and defaults of ``FlowMatchHeunDiscreteScheduler``; there are no betas."""

    sampler: ClassVar[str] = "flow_heun"

    shift: float = 1.0


@dataclass(frozen=True)
class FlowEulerOptions(FlowHeunOptions, Respacing):
    """Fields and defaults of ``FlowMatchEulerDiscreteScheduler`` that change a result."""

    sampler: ClassVar[str] = "flow_euler"

    use_dynamic_shifting: bool = False
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    stochastic_sampling: bool = False


def flow_euler(config: Mapping[str, Any], run: Run) -> Draft:
    """Euler's method on the flow; with ``stochastic_sampling`` fresh noise at every call instead."""
    options = read_options(FlowEulerOptions, config)
    # Its shift depends on the size of the picture, which a table does not know.
    require(options, "use_dynamic_shifting", False)
    sigmas, timesteps = _sigmas(options, run), run.timesteps
    if options.shift_terminal:
        rest = 1 - sigmas
        sigmas = 1 - rest * (1 - options.shift_terminal) / rest[-1]
    spaced = respaced(options, float(sigmas[-1]), float(sigmas[0]), run.steps)
    sigmas = _rounded(sigmas if spaced is None else spaced)
    if options.invert_sigmas:
        sigmas, timesteps = _rounded(1 - sigmas), None
    if timesteps is None:
        timesteps = sigmas * options.num_train_timesteps
    now, after = sigmas, np.append(sigmas[1:], 1.0 if options.invert_sigmas else 0.0)
    zero, one = np.zeros(run.steps), np.ones(run.steps)
    if options.stochastic_sampling:
        prediction, update = np.stack([one, -now], axis=1), np.stack([zero, 1 - after, after], axis=1)
        clean = None
    else:
        prediction, update = np.stack([zero, one], axis=1), np.stack([one, after - now, zero], axis=1)
        clean = np.stack([one, -after], axis=1)
    levels = None if options.invert_sigmas else np.stack([1 - now, now], axis=1)
    return Draft(timesteps, prediction, update, draws=options.stochastic_sampling, levels=levels, clean=clean)


def flow_heun(config: Mapping[str, Any], run: Run) -> Draft:
    """The trapezoidal rule on the flow, two calls a step, Euler's method to the last sigma of 0."""
    options = read_options(FlowHeunOptions, config)
    sigmas = _rounded(_sigmas(options, run))
    rows = []
    for step in np.diff(sigmas):
        first = SAMPLE + step * PREDICTION
        rows += [first, carried(SAMPLE, first) + step / 2 * (past(1) + PREDICTION)]
    rows.append(SAMPLE - sigmas[-1] * PREDICTION)
    doubled = np.append(sigmas[:1], np.repeat(sigmas[1:], 2))
    velocity = np.tile([0.0, 1.0], (len(rows), 1))
    levels = np.stack([1 - doubled, doubled], axis=1)
    timesteps = doubled * options.num_train_timesteps
    clean = np.stack([np.ones(len(rows)), -np.append(doubled[1:], 0.0)], axis=1)
    return Draft(timesteps, velocity, np.stack(rows)[:, :4], levels=levels, calls=2, clean=clean)


def _sigmas(options: FlowHeunOptions, run: Run) -> F64:
    """Shifted times, descending, [N].

    Between the ends of training, which diffusers has shifted before, so that they are shifted twice.
    """
    total = options.num_train_timesteps
    if run.sigmas is not None:
        times = _rounded(run.sigmas)
    elif run.timesteps is not None:
        times = _rounded(run.timesteps) / total
    else:
        low = float(_rounded(_shifted(np.array([1 / total]), options.shift))[0])
        times = np.linspace(total, low * total, run.steps) / total
    return _shifted(times, options.shift)


def _shifted(times: F64, shift: float) -> F64:
    return shift * times / (1 + (shift - 1) * times)


def _rounded(values: F64) -> F64:
    """As diffusers keeps them."""
    return values.astype(np.float32).astype(np.float64)
