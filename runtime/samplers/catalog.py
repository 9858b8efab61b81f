"""What samplers there are, and by which names."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from allaprima.bundle.errors import RequestError
from allaprima.runtime.samplers.consistency import LCMOptions, TCDOptions
from allaprima.runtime.samplers.ddim import DDIMOptions, DDPMOptions, UnCLIPOptions
from allaprima.runtime.samplers.deis import DEISOptions
from allaprima.runtime.samplers.dpm import DPMOptions, SinglestepOptions
from allaprima.runtime.samplers.dpm_sde import DPMSDEOptions
from allaprima.runtime.samplers.euler import AncestralOptions, EulerOptions
from allaprima.runtime.samplers.flash import FlashOptions
from allaprima.runtime.samplers.flow import FlowEulerOptions, FlowHeunOptions
from allaprima.runtime.samplers.heun import HeunOptions, KDPM2Options
from allaprima.runtime.samplers.lms import LMSOptions
from allaprima.runtime.samplers.pndm import PNDMOptions
from allaprima.runtime.samplers.unipc import UniPCOptions
from allaprima.runtime.schedule import Training

RULES = ("karras", "exponential", "beta")
"""How sigmas can be spaced by a rule of their own."""


@dataclass(frozen=True)
class SamplerInfo:
    """What there is to know about a sampler before using it."""

    name: str
    """Canonical short name."""
    title: str
    """The name that user interfaces show."""
    scheduler: str
    """The class of diffusers that it equals, or a name of the same kind where diffusers has none."""
    aliases: tuple[str, ...]
    """Further names."""
    description: str
    """One line."""
    options: tuple[str, ...]
    """The fields of a scheduler configuration that it reads."""
    calls: int = 1
    """How often a step calls the model; where this is 2, the last step does once."""
    noise: Literal["no", "yes", "with eta", "with s_churn"] = "no"
    """Whether it draws noise after the initial sample, once a call at most."""
    history: int = 0
    """How many earlier predictions it needs, in its usual configuration."""
    arguments: tuple[str, ...] = ()
    """The arguments of ``make_table`` that mean something to it."""
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

    A name is the short one, that of the diffusers class (with or without "Scheduler"), or a usual title. With
    "Karras", "Exponential" or "Beta" after it, it has sigmas by that rule, listed or not.

    Raises:
        RequestError: there is none of that name; the message lists those there are.
    """
    wanted = _folded(sampler)
    if wanted in _SPELLINGS:
        return _SPELLINGS[wanted]
    for rule in RULES:
        plain = _SPELLINGS.get(wanted.removesuffix(rule))
        if plain is not None and f"use_{rule}_sigmas" in plain.options and plain.name == _plain_name(plain):
            return _spaced(plain, rule)
    close = difflib.get_close_matches(wanted, _SPELLINGS, n=1)
    hint = f"did you mean {_SPELLINGS[close[0]].name!r}? " if close else ""
    raise RequestError(f"there is no sampler {sampler!r}: {hint}The samplers are {listing()}")


def _plain_name(info: SamplerInfo) -> str:
    """Its name without a rule for sigmas."""
    return re.sub(rf"_({'|'.join(RULES)})$", "", info.name)


def _folded(name: str) -> str:
    return re.sub(r"[\s_\-.]", "", name.lower().replace("++", "pp")).removesuffix("scheduler")


def _fields(kind: type[Training]) -> tuple[str, ...]:
    return tuple(option.name for option in fields(kind))


def _info(
    kind: type[Training], title: str, scheduler: str, description: str, *aliases: str, **rest: Any
) -> SamplerInfo:
    name = rest.pop("name", kind.sampler)
    return SamplerInfo(name, title, f"{scheduler}Scheduler", aliases, description, _fields(kind), **rest)


def _spaced(plain: SamplerInfo, suffix: str) -> SamplerInfo:
    """A variant on "karras", "exponential" or "beta" sigmas."""
    return replace(
        plain,
        name=f"{plain.name}_{suffix}",
        title=f"{plain.title} {suffix.title()}",
        aliases=tuple(f"{alias} {suffix.title()}" for alias in plain.aliases if not alias.startswith("k_")),
        description=f"{plain.title} on {suffix.title()} sigmas.",
        arguments=tuple(name for name in plain.arguments if name not in ("timesteps", "sigmas")),
        overrides={**plain.overrides, f"use_{suffix}_sigmas": True},
    )


def _with_variants(*plain: SamplerInfo) -> tuple[SamplerInfo, ...]:
    """Each sampler, on Karras sigmas where its class can; DPM++'s multistep also on exponential ones."""
    listed: list[SamplerInfo] = []
    for info in plain:
        listed.append(info)
        if "use_karras_sigmas" in info.options and info.name != "flow_euler":
            listed.append(_spaced(info, "karras"))
        if info.scheduler == "DPMSolverMultistepScheduler":
            listed.append(_spaced(info, "exponential"))
    return tuple(listed)


_LISTED = ("timesteps",)
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_DPM, _SINGLE = (DPMOptions, "DPMSolverMultistep"), (SinglestepOptions, "DPMSolverSinglestep")
_SAMPLERS = _with_variants(
    _info(
        *(DDIMOptions, "DDIM", "DDIM"),
        "First order on listed timesteps; deterministic, or with noise by eta.",
        noise="with eta",
        arguments=("eta",),
    ),
    _info(
        *(DDPMOptions, "DDPM", "DDPM", "The ancestral sampler of training; wants many steps."),
        noise="yes",
        arguments=_LISTED,
    ),
    _info(
        *(PNDMOptions, "PNDM", "PNDM"),
        "Fourth-order linear multistep; calls the model once more than there are steps.",
        "PLMS",
        history=4,
    ),
    _info(
        *(LMSOptions, "LMS", "LMSDiscrete", "Fourth-order linear multistep on uneven sigmas.", "k_lms"),
        history=3,
        arguments=("order",),
    ),
    _info(
        *(EulerOptions, "Euler", "EulerDiscrete"),
        "First order on the probability-flow ODE; noise by s_churn.",
        "k_euler",
        noise="with s_churn",
        arguments=("s_churn", "s_tmin", "s_tmax", "s_noise", "timesteps", "sigmas"),
    ),
    _info(
        *(AncestralOptions, "Euler a", "EulerAncestralDiscrete", "Euler with fresh noise at every step."),
        *("Euler ancestral", "k_euler_a", "k_euler_ancestral"),
        noise="yes",
    ),
    _info(
        *(HeunOptions, "Heun", "HeunDiscrete", "Second order by the trapezoidal rule; two calls a step."),
        "k_heun",
        calls=2,
        history=1,
        arguments=_LISTED,
    ),
    _info(
        *(KDPM2Options, "DPM2", "KDPM2Discrete", "Second order by the midpoint; two calls a step."),
        *("k_dpm_2", "KDPM2"),
        calls=2,
        history=1,
    ),
    _info(
        *(
            KDPM2Options,
            "DPM2 a",
            "KDPM2AncestralDiscrete",
            "DPM2 with fresh noise at every step but the last.",
        ),
        *("DPM2 ancestral", "k_dpm_2_a", "k_dpm_2_ancestral", "KDPM2 ancestral"),
        name="dpm2_a",
        calls=2,
        noise="yes",
        history=1,
    ),
    _info(
        *(_DPM[0], "DPM++ 2M", _DPM[1], "Second-order multistep; good from 10 to 30 steps."),
        *("k_dpmpp_2m", "DPM-Solver++ 2M"),
        history=1,
        arguments=_LISTED,
    ),
    _info(
        *(_DPM[0], "DPM++ 2M SDE", _DPM[1], "DPM++ 2M with fresh noise at every step."),
        *("k_dpmpp_2m_sde", "DPM-Solver++ 2M SDE"),
        name="dpmpp_2m_sde",
        noise="yes",
        history=1,
        arguments=_LISTED,
        overrides=_SDE,
    ),
    _info(
        *(_DPM[0], "DPM++ 3M SDE", _DPM[1], "Third-order multistep with fresh noise at every step."),
        *("k_dpmpp_3m_sde", "DPM-Solver++ 3M SDE"),
        name="dpmpp_3m_sde",
        noise="yes",
        history=2,
        arguments=_LISTED,
        overrides={**_SDE, "solver_order": 3},
    ),
    _info(
        *(
            _SINGLE[0],
            "DPM++ 2S",
            _SINGLE[1],
            "DPM-Solver++ whose every other call starts over; one call a step.",
        ),
        *("DPM++ singlestep", "DPM-Solver++ 2S"),
        history=1,
        arguments=_LISTED,
    ),
    _info(
        *(
            DPMSDEOptions,
            "DPM++ SDE",
            "DPMSolverSDE",
            "DPM++ 2S on the SDE; two calls a step, with noise.",
        ),
        *("k_dpmpp_sde", "DPM-Solver++ SDE"),
        calls=2,
        noise="yes",
        history=1,
        arguments=("s_noise",),
    ),
    _info(
        *(DEISOptions, "DEIS", "DEISMultistep", "Exponential multistep on the noise, in log-rho."), history=1
    ),
    _info(
        *(UniPCOptions, "UniPC", "UniPCMultistep"),
        "Multistep predictor with a corrector for free; good from 5 steps.",
        history=2,
        arguments=("sigmas",),
    ),
    _info(
        *(LCMOptions, "LCM", "LCM", "For latent consistency models: 1 to 8 steps."),
        noise="yes",
        arguments=_LISTED,
    ),
    _info(
        *(
            TCDOptions,
            "TCD",
            "TCD",
            "For trajectory consistency distillation, Hyper-SD: noise by eta (gamma).",
        ),
        noise="with eta",
        arguments=("eta", "timesteps"),
    ),
    _info(
        *(FlashOptions, "Flash", "Flash", "For Kandinsky Flash: clean samples with fresh noise; 4 steps."),
        "Kandinsky Flash",
        noise="yes",
        arguments=_LISTED,
    ),
    _info(*(UnCLIPOptions, "UnCLIP", "UnCLIP", "DDPM on a cosine schedule, for priors."), noise="yes"),
    _info(
        *(FlowEulerOptions, "Flow Euler", "FlowMatchEulerDiscrete", "Euler for rectified flows."),
        "Flow match Euler",
        arguments=("timesteps", "sigmas"),
    ),
    _info(
        *(
            FlowHeunOptions,
            "Flow Heun",
            "FlowMatchHeunDiscrete",
            "Heun for rectified flows; two calls a step.",
        ),
        "Flow match Heun",
        calls=2,
        history=1,
    ),
)
# Variants share their class, so the plain form, which comes first, must win.
_SPELLINGS = {
    _folded(name): info
    for info in reversed(_SAMPLERS)
    for name in (info.name, info.title, info.scheduler, *info.aliases)
}
