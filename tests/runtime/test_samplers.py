"""Every table against the scheduler of diffusers that it stands for, over whole trajectories."""

import inspect
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from allaprima.bundle.errors import RequestError
from allaprima.runtime.noise import Noise
from allaprima.runtime.samplers import Table, find, make_table, names

F64 = NDArray[np.float64]
HISTORY = 4
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SHAPE = (1, 2, 3, 4)
STEPS = (1, 2, 5, 20, 50)
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")

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
    scheduler: Any, steps: int, monkeypatch: pytest.MonkeyPatch, **arguments: Any
) -> Trajectory:
    """Drive a scheduler of diffusers as its pipelines do, in float64 as far as they allow."""
    model, noise = Model(), noises()
    drawn: list[bool] = []

    def draw(*_: Any, dtype: torch.dtype, **__: Any) -> torch.Tensor:
        drawn[-1] = True
        return torch.from_numpy(noise()).to(dtype)

    module = inspect.getmodule(type(scheduler))
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", draw)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it starts at the second of equal timesteps, and runs out of them
    for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    sample = torch.from_numpy(noise()) * float(scheduler.init_noise_sigma)
    samples = [sample.numpy()]
    for timestep in scheduler.timesteps:
        drawn.append(False)
        output = torch.from_numpy(model(scheduler.scale_model_input(sample, timestep).numpy()))
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
    return Trajectory(samples, table.timesteps.tolist(), table.draws.tolist())


def error_of(
    table: Table, scheduler: Any, steps: int, monkeypatch: pytest.MonkeyPatch, **arguments: Any
) -> float:
    """The largest relative error along the way; timesteps and draws must be equal."""
    expected, actual = run_scheduler(scheduler, steps, monkeypatch, **arguments), run_table(table)
    if np.all(np.mod(expected.timesteps, 1) == 0):
        assert actual.timesteps == expected.timesteps
    else:  # interpolated in a table of float32, in which PyTorch's square root is sometimes an ulp off
        np.testing.assert_allclose(actual.timesteps, expected.timesteps, rtol=1e-6, atol=1e-4)
    assert actual.draws == expected.draws
    pairs = zip(actual.samples, expected.samples, strict=True)
    return max(float(np.abs(a - e).max() / np.abs(e).max()) for a, e in pairs)


CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ddim", {}),
    ("ddim", {"set_alpha_to_one": True, "steps_offset": 0}),
    ("ddim", {"rescale_betas_zero_snr": True}),
    ("ddpm", {}),
    ("ddpm", {"variance_type": "fixed_small_log"}),
    ("ddpm", {"variance_type": "fixed_large", "steps_offset": 0}),
    ("ddpm", {"clip_sample": True, "clip_sample_range": 2.5}),
    ("ddpm", {"rescale_betas_zero_snr": True}),
    ("pndm", {}),
    ("pndm", {"set_alpha_to_one": True}),
    ("euler", {}),
    ("euler", {"use_karras_sigmas": True}),
    ("euler", {"use_karras_sigmas": True, "sigma_min": 0.03, "sigma_max": 12.0}),
    ("euler", {"use_exponential_sigmas": True}),
    ("euler", {"final_sigmas_type": "sigma_min"}),
    ("euler", {"rescale_betas_zero_snr": True}),
    ("euler", {"timestep_type": "continuous"}),
    ("euler_a", {}),
    ("euler_a", {"rescale_betas_zero_snr": True}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m", {"solver_order": 1}),
    ("dpmpp_2m", {"solver_order": 3}),
    ("dpmpp_2m", {"solver_type": "heun"}),
    ("dpmpp_2m", {"solver_type": "bh2", "lower_order_final": False}),
    ("dpmpp_2m", {"use_karras_sigmas": True, "solver_type": "heun"}),
    ("dpmpp_2m", {"use_exponential_sigmas": True}),
    ("dpmpp_2m", {"use_lu_lambdas": True}),
    ("dpmpp_2m", {"use_karras_sigmas": True, "sigma_min": 0.03, "sigma_max": 12.0}),
    ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", {"rescale_betas_zero_snr": True}),
    ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}),
    ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "use_karras_sigmas": True}),
    ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "fields"), CASES, ids=lambda value: str(value))
def test_trajectory_of_diffusers(
    sampler: str, fields: Mapping[str, Any], prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(diffusers, find(sampler).scheduler)
    if prediction == "sample" and sampler in ("pndm", "euler_a"):
        with pytest.raises(RequestError, match="prediction_type='sample'"):
            make_table({**SD, **fields, "prediction_type": prediction}, sampler, 5, history=HISTORY)
        return
    for spacing, steps in itertools.product(SPACINGS, STEPS):
        config = {**SD, **fields, "prediction_type": prediction, "timestep_spacing": spacing}
        if fields.get("rescale_betas_zero_snr") and sampler in ("ddim", "ddpm") and prediction == "epsilon":
            continue  # dividing by an alpha of zero: see test_no_table_of_infinities
        table = make_table(config, sampler, steps, history=HISTORY)
        # With zero terminal SNR diffusers takes logarithms in float32 of ratios up to 4096; what is left of
        # their last digits depends on the processor.
        limit = 3e-5 if fields.get("rescale_betas_zero_snr") else 1e-5
        assert error_of(table, kind.from_config(config), steps, monkeypatch) <= limit, (spacing, steps)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_with_noise(prediction: str, eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**SD, "prediction_type": prediction}
    for steps in STEPS:
        table = make_table(config, "ddim", steps, history=HISTORY, eta=eta)
        scheduler = diffusers.DDIMScheduler.from_config(config)
        assert error_of(table, scheduler, steps, monkeypatch, eta=eta) <= 1e-6


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_cosine_schedule(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = getattr(diffusers, find(sampler).scheduler)
    for fields in ({}, {"use_karras_sigmas": True}, {"lambda_min_clipped": -5.1}):
        config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", **fields}
        for steps in (5, 20):
            table = make_table(config, sampler, steps, history=HISTORY)
            assert error_of(table, kind.from_config(config), steps, monkeypatch) <= 1e-5, (fields, steps)


ORIGINS = (
    "DDIM",
    "DDPM",
    "PNDM",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "DPMSolverMultistep",
    "UniPCMultistep",
)


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("info", names(), ids=lambda info: info.name)
@pytest.mark.parametrize("saved", [True, False], ids=["file", "memory"])
def test_configurations_cross_over(
    info: Any, origin: str, saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another sampler's configuration, a table equals ``from_config``, hidden fields or not."""
    fields = {name: SD[name] for name in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
    if info.name in ("ddim", "pndm"):  # defaults that cannot be honoured
        fields |= {"clip_sample": False, "skip_prk_steps": True}
    kind = getattr(diffusers, f"{origin}Scheduler")
    source = kind.from_config(fields)
    config = json.loads(source.to_json_string()) if saved else dict(source.config)
    assert ("_use_default_values" in config) is not saved
    table = make_table(config, info.name, 10, history=HISTORY)
    target = getattr(diffusers, info.scheduler).from_config(
        source.config if not saved else config, **info.overrides
    )
    assert error_of(table, target, 10, monkeypatch) <= 1e-6


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler_a", "dpmpp_2m_sde"])
def test_seeds_of_diffusers(sampler: str) -> None:
    """In float32 and with our random stream, from the latents on, the sample is that of diffusers."""
    shape, eta = (1, 4, 8, 8), 0.5 if sampler == "ddim" else 0.0
    info = find(sampler)
    table = make_table(SD, sampler, 4, history=HISTORY, eta=eta)
    stream = Noise(11)
    sample = stream.normal(shape) * np.float32(table.init_noise_sigma)
    history = np.zeros((HISTORY, *shape), np.float32)
    for row in range(len(table.timesteps)):
        p, q = table.to_prediction[row]
        prediction = p * sample + q * np.tanh(sample * table.input_scale[row])
        noise = stream.normal(shape) if table.draws[row] else np.zeros(shape, np.float32)
        sample = np.tensordot(table.update[row], np.stack([sample, prediction, noise, *history]), 1)
        history = np.concatenate([prediction[None], history[:-1]])
    scheduler = getattr(diffusers, info.scheduler).from_config(SD, **info.overrides)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(11)
    extra: dict[str, Any] = {"eta": eta} if sampler == "ddim" else {}
    latents = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = torch.tanh(scheduler.scale_model_input(latents, t))
        latents = scheduler.step(output, t, latents, generator=generator, **extra).prev_sample
    np.testing.assert_allclose(sample, latents.numpy(), rtol=0, atol=1e-5)
