"""The one door to the tables of all samplers."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from allaprima.bundle.errors import RequestError
from allaprima.runtime.samplers.catalog import SamplerInfo, find, listing, names
from allaprima.runtime.samplers.consistency import lcm, tcd
from allaprima.runtime.samplers.ddim import ddim, ddpm, unclip
from allaprima.runtime.samplers.deis import deis
from allaprima.runtime.samplers.dpm import dpm, singlestep
from allaprima.runtime.samplers.dpm_sde import dpm_sde
from allaprima.runtime.samplers.euler import euler, euler_ancestral
from allaprima.runtime.samplers.flash import flash
from allaprima.runtime.samplers.flow import flow_euler, flow_heun
from allaprima.runtime.samplers.heun import heun, kdpm2, kdpm2_ancestral
from allaprima.runtime.samplers.lms import lms
from allaprima.runtime.samplers.pndm import pndm
from allaprima.runtime.samplers.run import Churn, Run, read_churn, read_custom, read_number, read_steps
from allaprima.runtime.samplers.table import Draft, Table
from allaprima.runtime.samplers.unipc import unipc
from allaprima.runtime.schedule import F64, Training, given_fields, read_options

_DRAFTS: dict[str, Callable[[Mapping[str, Any], Run], Draft]] = {
    "DDIMScheduler": ddim,
    "DDPMScheduler": ddpm,
    "PNDMScheduler": pndm,
    "LMSDiscreteScheduler": lms,
    "EulerDiscreteScheduler": euler,
    "EulerAncestralDiscreteScheduler": euler_ancestral,
    "HeunDiscreteScheduler": heun,
    "KDPM2DiscreteScheduler": kdpm2,
    "KDPM2AncestralDiscreteScheduler": kdpm2_ancestral,
    "DPMSolverMultistepScheduler": dpm,
    "DPMSolverSinglestepScheduler": singlestep,
    "DPMSolverSDEScheduler": dpm_sde,
    "DEISMultistepScheduler": deis,
    "UniPCMultistepScheduler": unipc,
    "LCMScheduler": lcm,
    "TCDScheduler": tcd,
    "FlashScheduler": flash,
    "UnCLIPScheduler": unclip,
    "FlowMatchEulerDiscreteScheduler": flow_euler,
    "FlowMatchHeunDiscreteScheduler": flow_heun,
}
# They begin in the middle by themselves, since their first calls differ from later ones.
_WITH_HISTORY = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
# These have fields of the same names, but no betas, so that tables made of the defaults would be nonsense.
_FLOWS = ("FlowMatch", "FlowMap")
_OTHER_PROCESSES = (*_FLOWS, "EDM")


def make_table(
    config: Mapping[str, Any],
    sampler: str | None,
    num_inference_steps: int | None,
    *,
    history: int,
    eta: float = 0.0,
    order: int | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    begin: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Table:
    """The table of a sampler on a model's noise schedule.

    Args:
        config: the model's scheduler configuration (``scheduler_config.json`` of diffusers). A sampler of
            another class takes from it the fields that it knows, as ``from_config`` does.
        sampler: any name that :func:`find` knows, or None for the class that the configuration names.
        num_inference_steps: from 1 to the timesteps of training; None if a custom schedule says it. The
            table has more rows if the sampler calls the model twice a step; PNDM has one more.
        history: S, the number of predictions that the denoiser keeps.
        eta: the noise of DDIM, or gamma of TCD, from 0 to 1; 0 for every other sampler.
        order: that of LMS, from 1 to 4; its own is 4.
        s_churn: how much noise Euler puts in, over all steps.
        s_tmin: the least sigma at which it does.
        s_tmax: the greatest sigma at which it does.
        s_noise: the standard deviation of that noise, relative to what keeps the level; also for DPM++ SDE.
        timesteps: a schedule of one's own, descending, for the samplers whose scheduler takes one.
        sigmas: likewise; for Euler the last one is that of the result, usually 0.
        begin: how many steps to leave out at the beginning, from 0 to one less than there are, for a sample
            that begins with a picture (see `Table.levels`).
        options: fields that take the place of those of ``config``.

    Raises:
        RequestError: an unknown sampler, a configuration that it cannot honour, an argument out of range.
    """
    info = _of_class(config) if sampler is None else find(sampler)
    _check_process(config, info)
    if not 0 <= read_number("eta", eta) <= 1:
        raise RequestError(f"eta {eta} is out of range: give a number from 0 to 1")
    if order is not None and order not in (1, 2, 3, 4):
        raise RequestError(f"order {order!r} is out of range: give 1, 2, 3 or 4")
    churn = read_churn(s_churn, s_tmin, s_tmax, s_noise)
    _check_arguments(info, {"eta": eta or None, "order": order, "timesteps": timesteps, "sigmas": sigmas})
    _check_arguments(
        info, {name: value for name, value in vars(churn).items() if value != getattr(Churn, name)}
    )
    fields = _configured(config, info, options)
    steps, listed, noisy = _schedule(fields, info, num_inference_steps, timesteps, sigmas)
    if not 0 <= begin < steps:
        raise RequestError(f"begin {begin} is out of range: {steps} steps can lack 0 to {steps - 1}")
    run = Run(steps, eta, churn, order, listed, noisy, begin)
    with np.errstate(divide="ignore", invalid="ignore"):  # finish() refuses what is not finite
        draft = _DRAFTS[info.scheduler](fields, run)
    if begin and draft.levels is None:
        raise RequestError(f"sampler {info.name!r} cannot begin with a picture: choose another one")
    if info.scheduler not in _WITH_HISTORY:
        draft = draft.begun(begin)
    return draft.finish(info.name, history)


def count_steps(
    config: Mapping[str, Any],
    sampler: str | None,
    num_inference_steps: int | None,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> int:
    """How many steps a table has, as a custom schedule says it by itself; arguments as of `make_table`.

    Raises:
        RequestError: as `make_table`, as far as the number goes.
    """
    info = _of_class(config) if sampler is None else find(sampler)
    _check_arguments(info, {"timesteps": timesteps, "sigmas": sigmas})
    return _schedule(given_fields(config), info, num_inference_steps, timesteps, sigmas)[0]


def _schedule(
    fields: Mapping[str, Any],
    info: SamplerInfo,
    steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
) -> tuple[int, F64 | None, F64 | None]:
    """The number of steps, and what is custom of timesteps and sigmas."""
    listed, noisy = read_custom("timesteps", timesteps), read_custom("sigmas", sigmas)
    most = read_options(Training, fields).num_train_timesteps
    closed = info.scheduler == "EulerDiscreteScheduler"
    return read_steps(steps, most, listed, noisy, closed), listed, noisy


def _configured(
    config: Mapping[str, Any], info: SamplerInfo, options: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The fields of the model's configuration, then the request's, then those that the name sets."""
    if not isinstance(options, Mapping | None):
        raise RequestError(f"scheduler options {options!r} are not a mapping of names to values")
    for name, value in (options or {}).items():
        if name not in info.options:
            close = difflib.get_close_matches(str(name), info.options, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise RequestError(
                f"scheduler option {name!r} means nothing to sampler {info.name!r}: {hint}It reads"
                f" {', '.join(info.options)}"
            )
        if name in info.overrides and value != info.overrides[name]:
            raise RequestError(
                f"scheduler option {name}={value!r} contradicts sampler {info.name!r}, which stands for"
                f" {name}={info.overrides[name]!r}: leave one of them out"
            )
    return {**given_fields(config), **(options or {}), **info.overrides}


def _of_class(config: Mapping[str, Any]) -> SamplerInfo:
    name = config.get("_class_name")
    for info in names():
        if info.scheduler == name:
            return info
    raise RequestError(
        f"the model's own scheduler {name!r} is not among the samplers: name one of {listing()}"
    )


def _check_process(config: Mapping[str, Any], info: SamplerInfo) -> None:
    """Refuse a flow's sampler for another process, and the other way about."""
    process = str(config.get("_class_name"))
    flow = info.scheduler.startswith(_FLOWS)
    if process.startswith(_FLOWS if flow else _OTHER_PROCESSES) != flow:
        remedy = "choose one that is not of a flow" if flow else "choose 'flow_euler' or 'flow_heun'"
        raise RequestError(f"sampler {info.name!r} cannot honour the configuration of a {process}: {remedy}")


def _check_arguments(info: SamplerInfo, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if value is not None and name not in info.arguments:
            able = ", ".join(repr(other.name) for other in names() if name in other.arguments)
            raise RequestError(
                f"{name} {value!r} means nothing to sampler {info.name!r}: leave it out, or choose one of"
                f" {able}"
            )
