"""DPM-Solver++ (2S) on the SDE, two calls a step: "DPM++ SDE" (as in K. Crowson's k-diffusion).

In sigma space. Its noise is the increments of one Brownian motion over sigma, so that a step's noise consists
of that of its first half and that of its second half: one draw of the random stream for each call.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from allaprima.runtime.samplers.euler import ancestral
from allaprima.runtime.samplers.recall import ECHO, NOISE, PREDICTION, SAMPLE, carried, echoes
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
from allaprima.runtime.schedule import F64, read_options, require, timesteps_of


@dataclass(frozen=True)
class DPMSDEOptions(SigmaOptions):
    """Fields and defaults of ``DPMSolverSDEScheduler`` that change a result; the seed is the request's."""

    sampler: ClassVar[str] = "dpmpp_sde"

    beta_start: float = 0.00085
    beta_end: float = 0.012


def dpm_sde(config: Mapping[str, Any], run: Run) -> Draft:
    """Each step goes half way in log sigma, then again from its start with the clean sample found there.

    Both are ancestral: to below their sigma, then noise up to it, ``s_noise`` times what keeps the level.
    """
    options = read_options(DPMSDEOptions, config)
    require(options, "prediction_type", "epsilon", "v_prediction")
    if options.rule == "use_karras_sigmas":
        options = replace(options, sigma_min=None, sigma_max=None)  # not read there
    table = training_sigmas(options)
    timesteps, sigmas = sigma_schedule(options, table, run)
    sigmas = closed(sigmas)
    middle = np.sqrt(sigmas[:-2] * sigmas[1:-1])
    rows = []
    for now, half, after in zip(sigmas[:-2], middle, sigmas[1:-1], strict=True):
        first = _toward(now, half, SAMPLE, run.churn.s_noise * NOISE)
        # Brownian motion: variances of the two halves add up to that of the step.
        share = np.sqrt((now - half) / (now - after))
        noise = run.churn.s_noise * (share * ECHO + np.sqrt(1 - share**2) * NOISE)
        rows += [first, _toward(now, after, carried(SAMPLE, first), noise)]
    rows.append(PREDICTION)
    update = np.stack(rows)
    draft = sigma_draft(
        options,
        interleaved(timesteps, timesteps_of(middle, table)),
        interleaved(sigmas[:-1], middle),
        update[:, :4],
        draws=np.arange(len(rows)) < len(rows) - 1,
        calls=2,
    )
    return replace(draft, echoes=echoes(update))


def _toward(now: float, after: float, start: F64, noise: F64) -> F64:
    """The form of an ancestral step from the form ``start``, at sigma ``now``."""
    up, down = ancestral(np.array([now]), np.array([after]))
    form: F64 = down[0] / now * start + (1 - down[0] / now) * PREDICTION + up[0] * noise
    return form
