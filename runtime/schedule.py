"""Noise schedules: from a diffusers scheduler configuration to betas, timesteps and sigmas.

Everything follows diffusers 0.42 to the last float32 bit where a table of a model is concerned (betas and
their cumulative product), because a picture is reproducible only if the tables are. What is derived from them
is computed in float64.
"""

import itertools
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allaprima.bundle.errors import RequestError

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
_ZERO_SNR = 2.0**-24  # what diffusers puts for an alpha of zero where sigma would be infinite
_RHO = 7.0  # Karras et al. 2022, equation 5


@dataclass(frozen=True)
class Training:
    """The fields that all scheduler configurations share, with the names that diffusers gives them.

    A sampler extends this class with its own fields and its own defaults; see :func:`read_options`.
    """

    sampler: ClassVar[str]
    beta_schedules: ClassVar[tuple[str, ...]] = ("linear", "scaled_linear", "squaredcos_cap_v2")

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: list[float] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0


_Options = TypeVar("_Options", bound=Training)


def given_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what ``from_config`` of diffusers drops: private fields, and those it lists as defaults."""
    unset = config.get("_use_default_values", ())
    return {name: value for name, value in config.items() if name not in unset and not name.startswith("_")}


def read_options(kind: type[_Options], config: Mapping[str, Any]) -> _Options:
    """Take from a scheduler configuration the fields that ``kind`` knows, as ``kind``'s ``from_config`` does.

    Absent fields get ``kind``'s defaults, fields of other samplers are left aside.

    Raises:
        RequestError: a field has the wrong type.
    """
    given = given_fields(config)
    hints = typing.get_type_hints(kind)
    known = (field.name for field in fields(kind) if field.name in given)
    return kind(**{name: _checked(name, given[name], hints[name]) for name in known})


def _checked(name: str, value: Any, hint: Any) -> Any:
    """Return ``value`` if it is of the type ``hint``; an int may stand for a float, never for a bool."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in allowed:
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if kind is int and isinstance(value, bool):
            continue
        if kind == list[float] and isinstance(value, list | tuple):
            return [_checked(name, item, float) for item in value]
        if isinstance(kind, type) and not typing.get_args(kind) and isinstance(value, kind):
            return value
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
    raise RequestError(f"scheduler option {name}={value!r} is ill-typed: it must be {wanted}")


def require(options: Training, name: str, *supported: object) -> None:
    """Refuse an option that the sampler cannot honour.

    Raises:
        RequestError: the value of the field ``name`` is not among ``supported``.
    """
    value = getattr(options, name)
    if value not in supported:
        choices = " or ".join(repr(choice) for choice in supported)
        raise RequestError(
            f"sampler {options.sampler!r} cannot honour the scheduler option {name}={value!r},"
            f" only {choices}: choose another sampler"
        )


def refuse_custom(reason: str | bool | None, sampler: str, what: str) -> None:
    """Refuse custom timesteps or sigmas because of the option ``reason``, if there is one.

    Raises:
        RequestError: there is.
    """
    if reason:
        raise RequestError(
            f"sampler {sampler!r} cannot take custom {what} together with the scheduler option {reason}:"
            " leave one of them out"
        )


def training_betas(options: Training) -> F32:
    """The betas of training, float32 [T], bit-equal to the table of diffusers.

    Raises:
        RequestError: unknown ``beta_schedule``, or ``trained_betas`` that are not T numbers.
    """
    count = options.num_train_timesteps
    if count < 1:
        raise RequestError(f"scheduler option num_train_timesteps={count} is not positive")
    if options.trained_betas is not None:
        if len(options.trained_betas) != count:
            raise RequestError(
                f"trained_betas has {len(options.trained_betas)} entries, num_train_timesteps is {count}"
            )
        return np.array(options.trained_betas, np.float32)
    require(options, "beta_schedule", *options.beta_schedules)
    if not (0 <= options.beta_start < 1 and 0 <= options.beta_end < 1):
        raise RequestError(
            f"beta_start={options.beta_start} and beta_end={options.beta_end} are not within 0 to 1"
        )
    if options.beta_schedule == "linear":
        return _linspace(options.beta_start, options.beta_end, count)
    if options.beta_schedule == "scaled_linear":
        return np.square(_linspace(math.sqrt(options.beta_start), math.sqrt(options.beta_end), count))
    return _bar_betas(_cosine_bar if options.beta_schedule == "squaredcos_cap_v2" else _exp_bar, count)


def training_alphas(options: Training, *, zero_snr: bool = False, positive: bool = False) -> F32:
    """The cumulative product of ``1 - beta`` ("alphas_cumprod"), float32 [T].

    ``zero_snr`` rescales the betas so that the last entry is 0 (Lin et al. 2023, algorithm 1), which
    ``positive`` replaces by 2**-24 for the samplers that divide by it.
    """
    alphas = _running_product(np.float32(1) - training_betas(options))
    if zero_snr:
        root = np.sqrt(alphas)
        first, last = root[0], root[-1]
        bar: F32 = np.square((root - last) * (first / (first - last)))
        # Through the betas and back, as diffusers does: its roundings belong to the table.
        betas = np.float32(1) - np.concatenate([bar[:1], bar[1:] / bar[:-1]])
        alphas = _running_product(np.float32(1) - betas)
        if positive:
            alphas[-1] = _ZERO_SNR
    return alphas


def sigmas_of(alphas: F32) -> F32:
    """Noise-to-signal ratios ``sqrt((1 - alpha) / alpha)``, float32 [T]."""
    sigmas: F32 = np.sqrt((np.float32(1) - alphas) / alphas)
    return sigmas


def _linspace(start: float, end: float, count: int) -> F32:
    """``torch.linspace`` in float32: counted from the nearer end, one rounding for each value."""
    if count == 1:
        return np.array([start], np.float32)
    low, high = np.float32(start), np.float32(end)
    step = np.float64((high - low) / np.float32(count - 1))
    index = np.arange(count)
    rising, falling = np.float64(low) + step * index, np.float64(high) - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def _running_product(values: F32) -> F32:
    """``torch.cumprod`` on a CPU: the running product is kept in float64 and each output rounded."""
    return np.cumprod(values, dtype=np.float64).astype(np.float32)


def _bar_betas(bar: Callable[[float], float], count: int) -> F32:
    """Betas, capped at 0.999, of a cumulative product that is a function of time from 0 to 1."""
    bars = [bar(i / count) for i in range(count + 1)]
    return np.array(
        [min(1 - after / before, 0.999) for before, after in itertools.pairwise(bars)], np.float32
    )


def _cosine_bar(time: float) -> float:
    """Nichol and Dhariwal 2021, equation 17."""
    return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2


def _exp_bar(time: float) -> float:
    return math.exp(-12 * time)


def spaced_timesteps(options: Training, steps: int) -> F64:
    """Timesteps in descending order, float64 [steps]; fractional for "linspace".

    Lin et al. 2023, table 2. Raises RequestError for an unknown ``timestep_spacing``.
    """
    require(options, "timestep_spacing", *SPACINGS)
    total = options.num_train_timesteps
    if options.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, steps)[::-1]
    if options.timestep_spacing == "leading":
        return np.arange(steps, dtype=np.float64)[::-1] * (total // steps) + options.steps_offset
    return trailing_timesteps(total, total / steps)


def trailing_timesteps(last: int, stride: float) -> F64:
    """``last - 1`` and down by ``stride``, rounded.

    For some step counts (61 of 1000, for one) rounding errors of the stride give ``arange`` one element too
    many, a timestep of -1 that diffusers runs the model at; it is dropped here.
    """
    timesteps = np.round(np.arange(last, 0, -stride)) - 1
    return timesteps[timesteps >= 0]


def training_indices(timesteps: ArrayLike, options: Training) -> NDArray[np.int64]:
    """Timesteps as indices of the training tables.

    Raises:
        RequestError: one lies outside the training schedule, because of ``steps_offset``.
    """
    indices = np.round(np.asarray(timesteps, np.float64)).astype(np.int64)
    if indices.min() < 0 or indices.max() >= options.num_train_timesteps:
        raise RequestError(
            f"sampler {options.sampler!r} would run from timestep {indices.max()} to {indices.min()}, but"
            f" the model knows {options.num_train_timesteps - 1} to 0: use fewer steps, or a steps_offset"
            f" other than {options.steps_offset}"
        )
    return indices


def karras_sigmas(low: float, high: float, steps: int) -> F64:
    """Karras et al. 2022, equation 5: from ``high`` down to ``low``, float64 [steps]."""
    ramp = np.linspace(0, 1, steps)
    start, end = high ** (1 / _RHO), low ** (1 / _RHO)
    return np.asarray((start + ramp * (end - start)) ** _RHO, np.float64)


def exponential_sigmas(low: float, high: float, steps: int) -> F64:
    """Uniform in the logarithm, from ``high`` down to ``low``, float64 [steps]."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def timesteps_of(sigmas: F64, table: F32) -> F64:
    """Fractional timesteps at which the training ``table``, interpolated in the logarithm, has ``sigmas``.

    The mixture of precisions is that of diffusers: some samplers truncate the result to integers.
    """
    logs = np.log(table)
    wanted = np.log(np.maximum(sigmas, 1e-10))
    below = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, len(logs) - 2)
    weight = np.clip((logs[below] - wanted) / (logs[below] - logs[below + 1]), 0, 1)
    return np.asarray((1 - weight) * below + weight * (below + 1), np.float64)
