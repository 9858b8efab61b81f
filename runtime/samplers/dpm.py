"""DPM-Solver and DPM-Solver++, multistep and singlestep, orders 1 to 3, ODE and SDE.

Lu et al. 2022, arXiv 2206.00927 (noise prediction) and 2211.01095 (data prediction, "++").
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from allaprima.bundle.errors import RequestError
from allaprima.runtime.samplers.lambda_space import (
    FEW_STEPS,
    LambdaOptions,
    Path,
    check,
    flow_sigmas,
    lambda_schedule,
    path_of,
    predicted,
    training_table,
)
from allaprima.runtime.samplers.recall import NOISE, SAMPLE, carried, echoes, past
from allaprima.runtime.samplers.run import Run
from allaprima.runtime.samplers.table import Draft
from allaprima.runtime.schedule import F64, PREDICTIONS, read_options, require

# Those of DEIS and UniPC stand for the usual ones in diffusers, so that configurations can cross over.
_ALGORITHMS = {"deis": "dpmsolver++"}
_SOLVERS = {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}


@dataclass(frozen=True)
class SinglestepOptions(LambdaOptions):
    """Fields and defaults of ``DPMSolverSinglestepScheduler``; it has no ``timestep_spacing``."""

    sampler: ClassVar[str] = "dpmpp_2s"

    lower_order_final: bool = False
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -math.inf
    variance_type: str | None = None

    @property
    def data(self) -> bool:
        """Whether the solver works on predictions of the clean sample."""
        return self.algorithm_type.endswith("++")

    @property
    def sde(self) -> bool:
        """Whether noise is drawn at every call."""
        return self.algorithm_type.startswith("sde")


_Options = TypeVar("_Options", bound=SinglestepOptions)


@dataclass(frozen=True)
class DPMOptions(SinglestepOptions):
    """Fields and defaults of ``DPMSolverMultistepScheduler``."""

    sampler: ClassVar[str] = "dpmpp_2m"

    lower_order_final: bool = True
    euler_at_final: bool = False
    use_lu_lambdas: bool | None = False
    rescale_betas_zero_snr: bool = False


class Terms(NamedTuple):
    """One step of the integrator: ``sample * x + zeroth * D0 + first * D1 + second * D2 + noise * z``.

    D0 is the prediction at the start, D1 and D2 its derivatives in units of the step. ``middle`` is the
    factor of D1 by the midpoint rule, ``first`` that by the exact integral.
    """

    sample: float
    zeroth: float
    middle: float
    first: float
    second: float
    noise: float


def dpm(config: Mapping[str, Any], run: Run) -> Draft:
    """Multistep: the derivatives come from the predictions of earlier calls."""
    options = _adopted(read_options(DPMOptions, config))
    if options.algorithm_type == "sde-dpmsolver":
        require(options, "solver_order", 1, 2)
    timesteps, path = _path(options, run)
    calls = len(timesteps)
    rows = [np.zeros(len(SAMPLE))] * run.begin
    for call in range(run.begin, calls):
        order = min(_order(options, call, calls), call - run.begin + 1)
        rows.append(_multistep(options, path, call, order))
    draft = _draft(options, timesteps, path, rows, history=options.solver_order - 1)
    return dataclasses.replace(draft, levels=path.levels()).begun(run.begin)


def singlestep(config: Mapping[str, Any], run: Run) -> Draft:
    """Singlestep: calls of rising order from one sample, then from the next; as many calls as steps."""
    options = _adopted(
        dataclasses.replace(read_options(SinglestepOptions, config), timestep_spacing="linspace")
    )
    if options.sde:
        # Order 3 goes back to a sample from before two noises were added, where there is one to remember.
        require(options, "solver_order", 1, 2)
    timesteps, path = _path(options, run)
    rows: list[F64] = []
    start = SAMPLE
    for call, order in enumerate(_orders(options, len(timesteps))):
        start = SAMPLE if order == 1 else carried(start, rows[-1])
        rows.append(_singlestep(options, path, call, order, start))
    return _draft(options, timesteps, path, rows, history=options.solver_order - 1)


def _adopted(options: _Options) -> _Options:
    """Checked, with the names of other schedulers replaced."""
    _check(options)
    return dataclasses.replace(
        options,
        algorithm_type=_ALGORITHMS.get(options.algorithm_type, options.algorithm_type),
        solver_type=_SOLVERS.get(options.solver_type, options.solver_type),
    )


def _check(options: SinglestepOptions) -> None:
    check(options)
    multistep = ("sde-dpmsolver",) if isinstance(options, DPMOptions) else ()
    known = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", *multistep, *_ALGORITHMS)
    require(options, "algorithm_type", *known)
    require(options, "solver_type", "midpoint", "heun", *_SOLVERS)
    require(options, "final_sigmas_type", "zero", "sigma_min")
    if not options.data:
        require(options, "prediction_type", *PREDICTIONS)
    # diffusers, too, refuses this for "deis", although it means "dpmsolver++" there.
    if not options.data and options.final_sigmas_type == "zero":
        raise RequestError(
            f"sampler {options.sampler!r} cannot honour final_sigmas_type='zero' together with"
            f" algorithm_type={options.algorithm_type!r}: set it to 'sigma_min'"
        )


def _path(options: SinglestepOptions, run: Run) -> tuple[F64, Path]:
    """Timesteps [N] and the path of ``set_timesteps``."""
    multistep = options if isinstance(options, DPMOptions) else None
    zero_snr = multistep is not None and multistep.rescale_betas_zero_snr
    uniform = multistep is not None and bool(multistep.use_lu_lambdas)
    if options.use_flow_sigmas:
        if uniform:
            raise RequestError("scheduler options use_flow_sigmas and use_lu_lambdas exclude each other")
        sigmas = flow_sigmas(options, run.steps)
        timesteps = np.trunc(sigmas * options.num_train_timesteps)
    else:
        rounded = multistep is None or options.beta_schedule != "squaredcos_cap_v2"
        timesteps, sigmas = lambda_schedule(
            options,
            run,
            zero_snr=zero_snr,
            rounded=rounded,
            uniform=uniform,
            clip=options.lambda_min_clipped,
        )
    last = 0.0
    if options.final_sigmas_type == "sigma_min":
        last = float(training_table(options, zero_snr=zero_snr)[0])
    return timesteps, path_of(options, sigmas, last)


def _draft(options: SinglestepOptions, timesteps: F64, path: Path, rows: list[F64], *, history: int) -> Draft:
    update, kept = np.stack(rows), predicted(options, path, data=options.data)
    return Draft(
        timesteps,
        update=update[:, : 3 + history],
        draws=options.sde,
        echoes=echoes(update),
        **kept._asdict(),
    )


def _order(options: DPMOptions, call: int, calls: int) -> int:
    """The order at this call, apart from the history being short at the start."""
    few = options.lower_order_final and calls < FEW_STEPS
    if call == calls - 1 and (options.euler_at_final or few or options.final_sigmas_type == "zero"):
        return 1
    return min(options.solver_order, 2) if call == calls - 2 and few else options.solver_order


def _orders(options: SinglestepOptions, calls: int) -> list[int]:
    """The orders of the calls: 1 to ``solver_order`` over and over, lower at the end if need be."""
    most = options.solver_order
    lower = options.lower_order_final or calls % most != 0 or options.final_sigmas_type == "zero"
    if lower and most > 1:
        whole, rest = divmod(calls, most)
        full, last = [*range(1, most + 1)], [*range(1, most), 1]
        orders = full * (whole - 1) + last if rest == 0 else full * whole + [*range(1, rest + 1)]
    else:
        orders = [*range(1, most + 1)] * (calls // most)
    if options.final_sigmas_type == "zero":
        orders[-1] = 1
    return orders


def _terms(options: SinglestepOptions, path: Path, start: int, end: int) -> Terms:
    """Integrate from one point of the path to another.

    Noise prediction is data prediction with alpha and sigma exchanged, so that lambda changes its sign. The
    SDE shares the formulas of the ODE if the span of lambda counts double.
    """
    h = float(path.lambdas[end] - path.lambdas[start])
    scale, other = (path.alpha, path.sigma) if options.data else (path.sigma, path.alpha)
    doubled = options.sde and options.data
    span = (2 * h if doubled else h) * (1 if options.data else -1)
    gain = -math.expm1(-span)
    flat = not span or math.isinf(span)
    slope = 0.0 if flat else 1 - gain / span
    # With -1/2 this vanishes with the span, as it should; diffusers adds 1/2 for the SDE, so we do.
    bend = 0.0 if flat else (span - gain) / span**2 + (0.5 if doubled else -0.5)
    weight = scale[end] * (2 if options.sde and not options.data else 1)
    sample = other[end] / other[start] * (math.exp(-h) if doubled else 1)
    noise = 0.0
    if options.sde:
        noise = path.sigma[end] * math.sqrt(-math.expm1(-2 * h) if options.data else math.expm1(2 * h))
    return Terms(sample, weight * gain, weight * gain / 2, weight * slope, -weight * bend, noise)


def _multistep(options: DPMOptions, path: Path, call: int, order: int) -> F64:
    terms = _terms(options, path, call, call + 1)
    row: F64 = terms.sample * SAMPLE + terms.zeroth * past(0) + terms.noise * NOISE
    if order == 1:
        return row
    # The newest step first.
    steps: F64 = np.diff(path.lambdas[call - order + 1 : call + 2])[::-1]
    newer: F64 = steps[0] / steps[1] * (past(0) - past(1))
    if order == 2:
        return row + (terms.first if options.solver_type == "heun" else terms.middle) * newer
    both = steps[1] + steps[2]
    change: F64 = newer - steps[0] / steps[2] * (past(1) - past(2))
    slope: F64 = newer + steps[1] / both * change
    bend: F64 = steps[0] / both * change
    return row + terms.first * slope + terms.second * bend


def _singlestep(options: SinglestepOptions, path: Path, call: int, order: int, start: F64) -> F64:
    """From the sample ``order - 1`` calls ago, whose form is ``start``, to the next one."""
    origin = call - order + 1
    terms = _terms(options, path, origin, call + 1)
    row: F64 = terms.sample * start + terms.zeroth * past(order - 1) + terms.noise * NOISE
    if order == 1:
        return row
    spans = path.lambdas[origin + 1 : call + 2] - path.lambdas[origin]
    ratios: F64 = spans[:-1] / spans[-1]
    newest: F64 = (past(0) - past(order - 1)) / ratios[-1]
    if order == 2:
        return row + (terms.first if options.solver_type == "heun" else terms.middle) * newest
    if options.solver_type == "midpoint":
        return row + terms.first * newest
    older: F64 = (past(1) - past(2)) / ratios[0]
    apart = ratios[1] - ratios[0]
    slope: F64 = (ratios[1] * older - ratios[0] * newest) / apart
    bend: F64 = 2 / apart * (newest - older)
    return row + terms.first * slope + terms.second * bend
