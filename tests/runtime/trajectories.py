"""Whole trajectories: a table and the scheduler of diffusers that it stands for, side by side."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from allaprima.runtime.samplers import Table, find

F64 = NDArray[np.float64]
HISTORY = 4
SHAPE = (1, 2, 3, 4)
STEPS = (1, 2, 3, 5, 20, 50)
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
_FLOATS = (
    *("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "alphas", "betas"),
    *("alphas_cumprod", "final_alpha_cumprod"),
)

# Stable Diffusion's schedule, as its scheduler_config.json has it after loading.
SD = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


class Trajectory(NamedTuple):
    """What a run leaves: the samples from the initial one on, the timesteps, where noise was drawn."""

    samples: list[F64]
    timesteps: list[float]
    draws: list[bool]


class Model:
    """Stands for a UNet: anything that depends on its input and changes from call to call.

    If it is ``learned``, variances follow as further channels.
    """

    def __init__(self, *, learned: bool = False) -> None:
        self._random = np.random.default_rng(1)
        self._learned = learned

    def __call__(self, sample: F64) -> F64:
        output: F64 = 0.3 * sample + self._random.standard_normal(SHAPE)
        if not self._learned:
            return output
        return np.concatenate([output, self._random.uniform(0.1, 0.9, SHAPE)], axis=1)


class Brownian:
    """Stands for the Brownian tree of DPM++ SDE: one draw for every half of a step."""

    def __init__(self, draw: Callable[[], torch.Tensor]) -> None:
        self._draw = draw
        self._half: tuple[float, float, torch.Tensor] | None = None

    def __call__(self, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        now, after = float(start), float(end)
        if self._half is None:
            self._half = now, after, self._draw()
            return self._half[2]
        (begin, middle, first), self._half = self._half, None
        assert begin == now > middle > after
        motion = (now - middle) ** 0.5 * first + (middle - after) ** 0.5 * self._draw()
        return motion / (now - after) ** 0.5


def scheduler_class(sampler: str) -> Any:
    """The class of diffusers that a sampler equals; one of them is hidden where there is no torchsde."""
    name = find(sampler).scheduler
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    sys.modules.setdefault("torchsde", ModuleType("torchsde"))
    return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler


def noises() -> Callable[[], F64]:
    random = np.random.default_rng(2)
    return lambda: random.standard_normal(SHAPE)


def run_scheduler(
    scheduler: Any,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
    custom: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Trajectory:
    """Drive a scheduler of diffusers as its pipelines do, in float64 as far as they allow.

    ``custom`` is given to set_timesteps instead of the number of steps, ``arguments`` to every step.
    """
    model, noise = Model(learned=is_learned(scheduler)), noises()
    drawn: list[bool] = []

    def draw(*_: Any, dtype: torch.dtype, **__: Any) -> torch.Tensor:
        drawn[-1] = True
        return torch.from_numpy(noise()).to(dtype)

    module = inspect.getmodule(type(scheduler))
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", draw)
    scheduler.set_timesteps(**({"num_inference_steps": steps} if custom is None else custom))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it starts at the second of equal timesteps, and runs out of them
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = Brownian(lambda: draw(dtype=torch.float64))
    for name in _FLOATS:
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    sample = torch.from_numpy(noise()) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    samples = [sample.numpy()]
    for index, timestep in enumerate(scheduler.timesteps):
        if isinstance(scheduler, diffusers.UnCLIPScheduler):  # pipelines tell it where a step ends
            following = scheduler.timesteps[index + 1 : index + 2]
            arguments["prev_timestep"] = following[0] if len(following) else None
        drawn.append(False)
        scale = getattr(scheduler, "scale_model_input", lambda sample, _: sample)  # flows have none
        output = torch.from_numpy(model(scale(sample, timestep).numpy()))
        sample = scheduler.step(output, timestep, sample, return_dict=False, **arguments)[0].double()
        samples.append(sample.numpy())
    return Trajectory(samples, [float(timestep) for timestep in scheduler.timesteps], drawn)


def is_learned(scheduler: Any) -> bool:
    """Whether the scheduler wants variances of the model."""
    return str(scheduler.config.get("variance_type")).startswith("learned")


def run_table(table: Table) -> Trajectory:
    """What the denoiser graph and the loop around it do, in float64."""
    model, noise = Model(learned=table.learned_variance is not None), noises()
    sample = noise() * table.init_noise_sigma
    history = np.zeros((table.update.shape[1] - 4, *SHAPE))
    samples, last = [sample], np.zeros(SHAPE)
    for row in range(len(table.timesteps)):
        output, *variance = np.split(
            model(sample * table.input_scale[row].astype(np.float64)),
            1 if table.learned_variance is None else 2,
            axis=1,
        )
        p, q = table.to_prediction[row].astype(np.float64)
        raw = p * sample + q * output
        prediction = _limited(table, row, sample, raw)
        fresh = noise() if table.draws[row] else np.zeros(SHAPE)
        last, fresh = fresh, fresh + table.echoes[row].astype(np.float64) * last
        update = table.update[row].astype(np.float64)
        terms = np.stack([sample, prediction, np.zeros(SHAPE), *history, raw])
        weight = update[2]
        if table.learned_variance is not None:
            span, share = table.learned_variance[row].astype(np.float64)
            weight = weight * np.exp(span * variance[0]) + share * np.sqrt(variance[0])
        sample = np.tensordot(update, terms, 1) + weight * fresh
        history = np.concatenate([prediction[None], history])[: len(history)]
        samples.append(sample)
    return Trajectory(samples, table.timesteps.astype(np.float32).tolist(), table.draws.tolist())


def _limited(table: Table, row: int, sample: F64, raw: F64) -> F64:
    limited = np.clip(raw, -table.bounds[row], table.bounds[row])
    if table.thresholds is not None:
        ratio, most = table.thresholds[row].astype(np.float64)
        level = min(max(np.quantile(np.abs(raw), ratio), 1), most)
        limited = np.clip(raw, -level, level) / level
    if table.from_limited is None:
        return limited
    r, s = table.from_limited[row].astype(np.float64)
    return np.asarray(r * sample + s * limited)


def error_of(
    table: Table,
    scheduler: Any,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
    custom: Mapping[str, Any] | None = None,
    slack: float = 1e-4,
    **arguments: Any,
) -> float:
    """The largest relative error along the way; draws must be equal, timesteps up to ``slack``."""
    expected, actual = run_scheduler(scheduler, steps, monkeypatch, custom, **arguments), run_table(table)
    if np.all(np.mod(expected.timesteps, 1) == 0):
        assert actual.timesteps == expected.timesteps
    else:  # interpolated in a table of float32, in which PyTorch's square root is sometimes an ulp off
        np.testing.assert_allclose(actual.timesteps, expected.timesteps, rtol=1e-6, atol=slack)
    assert actual.draws == expected.draws
    pairs = zip(actual.samples, expected.samples, strict=True)
    return max(float(np.abs(a - e).max() / np.abs(e).max()) for a, e in pairs)
