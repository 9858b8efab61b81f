"""Linear multistep in sigma space (as in K. Crowson's k-diffusion): Adams-Bashforth on uneven steps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from allaprima.runtime.samplers.run import Run
from allaprima.runtime.samplers.sigma_space import (
    SigmaOptions,
    clean,
    closed,
    sigma_draft,
    sigma_schedule,
    training_sigmas,
)
from allaprima.runtime.samplers.table import Draft, clean_from_noise
from allaprima.runtime.schedule import F64, PREDICTIONS, read_options, require

_ORDER = 4
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(2)  # exact up to the third degree, that of order 4


@dataclass(frozen=True)
class LMSOptions(SigmaOptions):
    """Fields and defaults of ``LMSDiscreteScheduler``."""

    sampler: ClassVar[str] = "lms"


def lms(config: Mapping[str, Any], run: Run) -> Draft:
    """The slopes of up to ``run.order`` calls, each weighted by the integral of its Lagrange polynomial.

    The prediction is the slope ``(sample - clean) / sigma``. The order grows from 1 as the history fills.
    """
    options = read_options(LMSOptions, config)
    require(options, "prediction_type", *PREDICTIONS)
    if options.rule == "use_karras_sigmas":
        options = read_options(LMSOptions, {**config, "sigma_min": None, "sigma_max": None})  # not read there
    timesteps, sigmas = sigma_schedule(options, training_sigmas(options), run)
    sigmas = closed(sigmas)
    now, most = sigmas[:-1], _ORDER if run.order is None else run.order
    update = np.zeros((len(now), 3 + most - 1))
    update[:, 0] = 1
    for call in range(run.begin, len(now)):
        order = min(call - run.begin + 1, most)
        known = sigmas[call + 1 - order : call + 1][::-1]
        update[call, [1, *range(3, 2 + order)]] = _weights(known, sigmas[call + 1])
    slope = np.array([1.0, 0.0]) - clean(options.prediction_type, now)
    draft = sigma_draft(options, timesteps, now, update, prediction=slope / now[:, None])
    # In sigma space the slope is the noise.
    return replace(draft, clean=clean_from_noise(np.ones(len(now)), sigmas[1:])).begun(run.begin)


def _weights(known: F64, target: float) -> F64:
    """Integrals from ``known[0]`` to ``target`` of the Lagrange polynomials over ``known``, [order]."""
    half = (target - known[0]) / 2
    places = known[0] + half * (1 + _NODES)
    weights = np.empty(len(known))
    for index, own in enumerate(known):
        others = np.delete(known, index)
        basis = np.prod((places[:, None] - others) / (own - others), axis=1)
        weights[index] = half * (basis @ _WEIGHTS)
    return weights
