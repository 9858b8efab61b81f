"""What samplers there are, and by which names."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from allaprima.bundle.errors import RequestError
from allaprima.runtime.samplers.ddim import DDIMOptions, DDPMOptions
from allaprima.runtime.samplers.dpm import DPMOptions
from allaprima.runtime.samplers.euler import AncestralOptions, EulerOptions
from allaprima.runtime.samplers.pndm import PNDMOptions
from allaprima.runtime.schedule import Training


@dataclass(frozen=True)
class SamplerInfo:
    """What there is to know about a sampler before using it."""

    name: str
    """Canonical short name."""
    title: str
    """The name that user interfaces show."""
    scheduler: str
    """The class of diffusers that it equals."""
    aliases: tuple[str, ...]
    """Further names."""
    description: str
    """One line."""
    noise: bool
    """Whether it may draw noise after the initial sample."""
    history: int
    """How many earlier predictions it needs, in its usual configuration."""
    options: tuple[str, ...]
    """The fields of a scheduler configuration that it reads."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields that the name itself sets, whatever the configuration says."""


def names() -> tuple[SamplerInfo, ...]:
    """All samplers, the plain form of each class before its variants."""
    return _SAMPLERS


def listing() -> str:
    """The short names, for messages."""
    return ", ".join(info.name for info in _SAMPLERS)


def find(sampler: str) -> SamplerInfo:
    """The sampler of a name, whatever its case, spaces, hyphens and underscores.

    A name is the short one, that of the diffusers class (with or without "Scheduler"), or a usual title.

    Raises:
        RequestError: there is none of that name; the message lists those there are.
    """
    wanted = _folded(sampler)
    if wanted in _SPELLINGS:
        return _SPELLINGS[wanted]
    close = difflib.get_close_matches(wanted, _SPELLINGS, n=1)
    hint = f"did you mean {_SPELLINGS[close[0]].name!r}? " if close else ""
    raise RequestError(f"there is no sampler {sampler!r}: {hint}The samplers are {listing()}")


def _folded(name: str) -> str:
    return re.sub(r"[\s_\-.]", "", name.lower().replace("++", "pp")).removesuffix("scheduler")


def _dpm(suffix: str, title: str, description: str, noise: bool, overrides: Mapping[str, Any]) -> SamplerInfo:
    name, options = f"dpmpp_2m{suffix}", _fields(DPMOptions)
    aliases = (f"k_{name}", f"DPM-Solver{title.removeprefix('DPM')}")
    scheduler = "DPMSolverMultistepScheduler"
    return SamplerInfo(name, title, scheduler, aliases, description, noise, 1, options, overrides)


def _fields(kind: type[Training]) -> tuple[str, ...]:
    return tuple(option.name for option in fields(kind))


_KARRAS = {"use_karras_sigmas": True}
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_SAMPLERS = (
    SamplerInfo(
        *("ddim", "DDIM", "DDIMScheduler"),
        aliases=(),
        description="First order on listed timesteps; deterministic, or with noise by eta.",
        noise=True,
        history=0,
        options=_fields(DDIMOptions),
    ),
    SamplerInfo(
        *("ddpm", "DDPM", "DDPMScheduler"),
        aliases=(),
        description="The ancestral sampler of training; wants many steps.",
        noise=True,
        history=0,
        options=_fields(DDPMOptions),
    ),
    SamplerInfo(
        *("pndm", "PNDM", "PNDMScheduler"),
        aliases=("PLMS",),
        description="Fourth-order linear multistep; calls the model once more than there are steps.",
        noise=False,
        history=4,
        options=_fields(PNDMOptions),
    ),
    SamplerInfo(
        *("euler", "Euler", "EulerDiscreteScheduler"),
        aliases=("k_euler",),
        description="First order on the probability-flow ODE.",
        noise=False,
        history=0,
        options=_fields(EulerOptions),
    ),
    SamplerInfo(
        *("euler_a", "Euler a", "EulerAncestralDiscreteScheduler"),
        aliases=("Euler ancestral", "k_euler_a", "k_euler_ancestral"),
        description="Euler with fresh noise at every step.",
        noise=True,
        history=0,
        options=_fields(AncestralOptions),
    ),
    _dpm("", "DPM++ 2M", "Second-order multistep; good from 10 to 30 steps.", False, {}),
    _dpm("_karras", "DPM++ 2M Karras", "DPM++ 2M on the sigmas of Karras et al.", False, _KARRAS),
    _dpm("_sde", "DPM++ 2M SDE", "DPM++ 2M with fresh noise at every step.", True, _SDE),
    _dpm("_sde_karras", "DPM++ 2M SDE Karras", "DPM++ 2M SDE on Karras' sigmas.", True, _SDE | _KARRAS),
)
# Variants share their class, so the plain form, which comes first, must win.
_SPELLINGS = {
    _folded(name): info
    for info in reversed(_SAMPLERS)
    for name in (info.name, info.title, info.scheduler, *info.aliases)
}
