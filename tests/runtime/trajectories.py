"""Whole trajectories: a table and the scheduler of diffusers that it stands for, side by side."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from allaprima.runtime.samplers import Table

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
    """Stands for a UNet: anything that depends on its input and changes from call to call."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(1)

    def __call__(self, sample: F64) -> F64:
        return 0.3 * sample + self._random.standard_normal(SHAPE)


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
    model, noise = Model(), noises()
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


def run_table(table: Table) -> Trajectory:
    """What the denoiser graph and the loop around it do, in float64."""
    model, noise = Model(), noises()
    sample = noise() * table.init_noise_sigma
    history = np.zeros((table.update.shape[1] - 3, *SHAPE))
    samples = [sample]
    for row in range(len(table.timesteps)):
        output = model(sample * table.input_scale[row].astype(np.float64))
        (p, q), bound = table.to_prediction[row].astype(np.float64), table.bounds[row]
        prediction = np.clip(p * sample + q * output, -bound, bound)
        fresh = noise() if table.draws[row] else np.zeros(SHAPE)
        update = table.update[row].astype(np.float64)
        sample = np.tensordot(update, np.stack([sample, prediction, fresh, *history]), 1)
        history = np.concatenate([prediction[None], history])[: len(history)]
        samples.append(sample)
    return Trajectory(samples, table.timesteps.astype(np.float32).tolist(), table.draws.tolist())


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
