"""UniPC: a predictor, and a corrector that needs no further call (Zhao et al. 2023, arXiv 2302.04867).

The corrector repeats the last step once its end has been predicted for, before the next step is taken. So one
row does both: correct the sample that the last row predicted, then predict from there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from allaprima.bundle.errors import RequestError
from allaprima.runtime.samplers.lambda_space import (
    LambdaOptions,
    Path,
    check,
    clean_of,
    lambda_schedule,
    noise_of,
    path_of,
    training_table,
)
from allaprima.runtime.samplers.limit import UNLIMITED
from allaprima.runtime.samplers.recall import SAMPLE, carried, past
from allaprima.runtime.samplers.run import Run
from allaprima.runtime.samplers.table import Draft
from allaprima.runtime.schedule import F64, PREDICTIONS, read_options, require

_SOLVERS = ("bh1", "bh2")
_EDGE = 1e-6  # diffusers keeps this distance of a flow from pure noise


@dataclass(frozen=True)
class UniPCOptions(LambdaOptions):
    """Fields and defaults of ``UniPCMultistepScheduler``."""

    sampler: ClassVar[str] = "unipc"

    predict_x0: bool = True
    solver_type: str = "bh2"
    disable_corrector: list[float] | None = None
    solver_p: None = None
    final_sigmas_type: str = "zero"
    rescale_betas_zero_snr: bool = False
    shift_terminal: float | None = None


class _Step(NamedTuple):
    """One step of lambda, from point ``start`` of the path to the next, at an order."""

    path: Path
    start: int
    order: int
    data: bool
    first: bool
    """B(h) of the paper: h if true ("bh1"), exp(h) - 1 if not ("bh2")."""


def unipc(config: Mapping[str, Any], run: Run) -> Draft:
    """UniPC-p of the paper, p = ``solver_order``, with B(h) by ``solver_type``."""
    options = read_options(UniPCOptions, config)
    _check(options, run.steps)
    timesteps, path = _path(options, run)
    calls = len(timesteps)
    rows: list[F64] = []
    start = SAMPLE  # the corrected sample that the last step began with, as a form
    step: _Step | None = None
    for call in range(run.begin, calls):
        sample = SAMPLE
        if step is not None:
            start = carried(start, rows[-1])
            if call - 1 not in (options.disable_corrector or ()):
                sample = _advance(step, start, [past(age) for age in range(1, step.order + 1)], past(0))
        order = min(options.solver_order, call - run.begin + 1)
        if options.lower_order_final:
            order = min(order, calls - call)
        step = _Step(path, call, order, options.predict_x0, options.solver_type == "bh1")
        start = sample
        rows.append(_advance(step, start, [past(age) for age in range(order)], None))
    # diffusers thresholds the clean sample only where it is what the solver works on.
    limit = options.limit if options.predict_x0 else UNLIMITED
    prediction = clean_of(options, path) if options.predict_x0 else noise_of(options, path)
    update = np.stack([np.zeros(len(SAMPLE))] * run.begin + rows)[:, : 3 + options.solver_order]
    clean = None if options.predict_x0 else path.clean_from_noise()
    draft = Draft(timesteps, prediction, update, limit=limit, levels=path.levels(), clean=clean)
    return draft.begun(run.begin)


def _check(options: UniPCOptions, steps: int) -> None:
    check(options)
    require(options, "solver_type", *_SOLVERS, "midpoint", "heun", "logrho")
    require(options, "solver_p", None)
    require(options, "shift_terminal", None)
    require(options, "final_sigmas_type", "zero", "sigma_min")
    if not options.predict_x0:
        require(options, "prediction_type", *PREDICTIONS)
    if options.final_sigmas_type == "zero":
        reasons = {
            "predict_x0=False": not options.predict_x0,
            "solver_type='bh1'": options.solver_type == "bh1",
            "lower_order_final=False": not options.lower_order_final and min(options.solver_order, steps) > 1,
        }
        for reason in (reason for reason, true in reasons.items() if true):
            raise RequestError(
                f"sampler 'unipc' has infinite coefficients with {reason} and final_sigmas_type='zero':"
                " set that to 'sigma_min'"
            )


def _path(options: UniPCOptions, run: Run) -> tuple[F64, Path]:
    """Timesteps [N] and the path of ``UniPCMultistepScheduler.set_timesteps``."""
    total = options.num_train_timesteps
    if options.use_flow_sigmas:
        times = np.linspace(1, 1 / total, run.steps + 1)[:-1]
        if run.sigmas is not None:
            times = run.sigmas
        sigmas = options.flow_shift * times / (1 + (options.flow_shift - 1) * times)
        if abs(sigmas[0] - 1) < _EDGE:
            sigmas = np.append(sigmas[0] - _EDGE, sigmas[1:])
        timesteps = np.trunc(sigmas * total)
    else:
        if run.sigmas is not None:
            raise RequestError(
                "sampler 'unipc' cannot take custom sigmas with the scheduler option"
                f" use_flow_sigmas={options.use_flow_sigmas}: leave them out"
            )
        timesteps, sigmas = lambda_schedule(options, run, zero_snr=options.rescale_betas_zero_snr)
    last = 0.0
    if options.final_sigmas_type == "sigma_min":
        own = options.use_flow_sigmas or options.rule
        table = training_table(options, zero_snr=options.rescale_betas_zero_snr)
        last = float(sigmas[-1] if own else table[0])
    return timesteps, path_of(options, sigmas, last)


def _advance(step: _Step, sample: F64, known: Sequence[F64], new: F64 | None) -> F64:
    """The form of the sample at the end of a step, equations 3 and 9 of the paper.

    ``known`` are the forms of the predictions at the step's start and before, newest first; ``new`` is that
    at its end, with which this is the corrector.
    """
    path, at = step.path, step.start
    scale, other = (path.alpha, path.sigma) if step.data else (path.sigma, path.alpha)
    h = float(path.lambdas[at + 1] - path.lambdas[at])
    if not h and step.order > 1:  # two equal timesteps: the paper has no answer, and the table is refused
        return np.full_like(sample, math.nan)
    signed = -h if step.data else h
    growth = math.expm1(signed)
    form: F64 = other[at + 1] / other[at] * sample - scale[at + 1] * growth * known[0]
    ratios = (path.lambdas[at - np.arange(1, step.order)] - path.lambdas[at]) / h
    points = [*known[1:], new] if new is not None else [*known[1:]]
    if not points:
        return form
    spread = np.append(ratios, 1.0) if new is not None else ratios
    factor = signed if step.first else growth
    weights = np.array([0.5]) if _short(step, new) else _weights(spread, signed, factor)
    for weight, ratio, point in zip(weights, spread, points, strict=True):
        form = form - scale[at + 1] * factor * weight / ratio * (point - known[0])
    return form


def _short(step: _Step, new: F64 | None) -> bool:
    """Whether one point decides alone, for which the paper takes 1/2 whatever h is (appendix F)."""
    return step.order == (1 if new is not None else 2)


def _weights(spread: F64, signed: float, factor: float) -> F64:
    """Solve the order conditions: the powers of ``spread`` must integrate as those of lambda do."""
    powers = np.vander(spread, increasing=True).T
    moments, phi, factorial = [], math.expm1(signed) / signed - 1, 1
    for k in range(1, len(spread) + 1):
        moments.append(phi * factorial / factor)
        factorial *= k + 1
        phi = phi / signed - 1 / factorial
    if len(np.unique(spread)) < len(spread):
        return np.full(len(spread), math.nan)
    return np.asarray(np.linalg.solve(powers, np.array(moments)), np.float64)
