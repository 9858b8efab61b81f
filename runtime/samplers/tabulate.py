"""The one door to the tables of all samplers."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from allaprima.bundle.errors import RequestError
from allaprima.runtime.samplers.catalog import SamplerInfo, find, listing, names
from allaprima.runtime.samplers.ddim import ddim, ddpm
from allaprima.runtime.samplers.dpm import dpm
from allaprima.runtime.samplers.euler import euler, euler_ancestral
from allaprima.runtime.samplers.pndm import pndm
from allaprima.runtime.samplers.table import Draft, Table
from allaprima.runtime.schedule import Training, given_fields, read_options

_DRAFTS: dict[str, Callable[[Mapping[str, Any], int], Draft]] = {
    "DDPMScheduler": ddpm,
    "PNDMScheduler": pndm,
    "EulerDiscreteScheduler": euler,
    "EulerAncestralDiscreteScheduler": euler_ancestral,
    "DPMSolverMultistepScheduler": dpm,
}
# These have fields of the same names, but no betas, so that tables made of the defaults would be nonsense.
_OTHER_PROCESSES = ("FlowMatch", "FlowMap", "EDM")


def make_table(
    config: Mapping[str, Any],
    sampler: str | None,
    num_inference_steps: int,
    *,
    history: int,
    eta: float = 0.0,
) -> Table:
    """The table of a sampler on a model's noise schedule.

    Args:
        config: the model's scheduler configuration (``scheduler_config.json`` of diffusers). A sampler of
            another class takes from it the fields that it knows, as ``from_config`` does.
        sampler: any name that :func:`find` knows, or None for the class that the configuration names.
        num_inference_steps: from 1 to the timesteps of training. PNDM makes one call more than this.
        history: S, the number of predictions that the denoiser keeps.
        eta: the noise of DDIM, from 0 to 1; 0 for every other sampler.

    Raises:
        RequestError: an unknown sampler, a configuration that it cannot honour, an argument out of range.
    """
    info = _of_class(config) if sampler is None else find(sampler)
    process = str(config.get("_class_name"))
    if process.startswith(_OTHER_PROCESSES):
        raise RequestError(f"sampler {info.name!r} cannot honour the configuration of a {process}")
    steps = _checked_steps(config, num_inference_steps)
    if not 0 <= eta <= 1:
        raise RequestError(f"eta {eta} is out of range: give a number from 0 to 1")
    if eta > 0 and info.name != "ddim":
        raise RequestError(
            f"eta {eta} means nothing to sampler {info.name!r}: leave it at 0, or choose 'ddim'"
        )
    given = {**given_fields(config), **info.overrides}
    with np.errstate(divide="ignore", invalid="ignore"):  # finish() refuses what is not finite
        draft = ddim(given, steps, eta) if info.name == "ddim" else _DRAFTS[info.scheduler](given, steps)
    return draft.finish(info.name, history)


def _of_class(config: Mapping[str, Any]) -> SamplerInfo:
    name = config.get("_class_name")
    for info in names():
        if info.scheduler == name:
            return info
    raise RequestError(
        f"the model's own scheduler {name!r} is not among the samplers: name one of {listing()}"
    )


def _checked_steps(config: Mapping[str, Any], steps: int) -> int:
    most = read_options(Training, config).num_train_timesteps
    try:
        value = operator.index(steps)
    except TypeError as error:
        raise RequestError(f"num_inference_steps {steps!r} is not an integer") from error
    if not 1 <= value <= most:
        raise RequestError(f"num_inference_steps {value} is out of range: this model takes 1 to {most}")
    return value
