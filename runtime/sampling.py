"""What a request may ask of the sampler beyond its name, the number of steps and eta."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Self

from allaprima.bundle import RequestError


@dataclass(frozen=True)
class Sampling:
    """Each is for the samplers that know it, see `allaprima samplers`; for others it is an error.

    Attributes:
        timesteps: a schedule of one's own, descending; it says the number of steps. Published ones, as "Align
            your steps", are such lists.
        sigmas: likewise. For Euler the last one is that of the result, usually 0.
        order: that of LMS, 1 to 4.
        s_churn: how much noise Euler puts in, over all steps (Karras et al. 2022, algorithm 2).
        s_tmin: the least sigma at which it does.
        s_tmax: the greatest sigma at which it does.
        s_noise: the standard deviation of that noise, relative to what keeps the level; also for DPM++ SDE.
        scheduler: fields of the scheduler's configuration that take the place of the model's own, as with
            `from_config(config, timestep_spacing="trailing")` in diffusers.
    """

    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    order: int | None = None
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    scheduler: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, value: Sampling | Mapping[str, Any] | None) -> Self:
        """From what a request holds: this, a mapping with its fields (as in Parameters), or None.

        Values are checked by `make_table`. Raises RequestError naming a field that does not exist.
        """
        if value is None:
            return cls()
        if isinstance(value, Sampling):
            value = {each.name: getattr(value, each.name) for each in fields(cls)}
        if not isinstance(value, Mapping):
            raise RequestError(f"sampling is {value!r}: it should be a Sampling or a mapping of its fields")
        known = [each.name for each in fields(cls)]
        for name in value:
            if name not in known:
                close = get_close_matches(str(name), known, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise RequestError(f"sampling has no field {name!r}: {hint}The fields are {', '.join(known)}")
        return cls(**{name: _plain(each) for name, each in value.items()})

    def arguments(self) -> dict[str, Any]:
        """For `make_table`."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        options = given.pop("scheduler")
        return {**given, "options": options}

    def to_json(self) -> dict[str, Any]:
        """What is not the default, of what `read` made, for JSON; `read` takes it."""
        plain = type(self)()
        chosen = ((each.name, getattr(self, each.name)) for each in fields(self))
        return {name: value for name, value in chosen if value != getattr(plain, name)}


def _plain(value: Any) -> Any:
    """Tuples as lists and numbers of NumPy as Python's, all the way down."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "tolist"):  # NumPy's arrays and numbers
        return _plain(value.tolist())
    return value
