"""Every table against the scheduler of diffusers that it stands for, over whole trajectories."""

import inspect
import itertools
import json
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from allaprima.bundle.errors import RequestError
from allaprima.runtime.noise import Draws, Noise
from allaprima.runtime.samplers import find, make_table, names

from .trajectories import HISTORY, PREDICTIONS, SD, SPACINGS, STEPS, Brownian, error_of, scheduler_class

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

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
        # SDE solvers of order 3 come to 8e-6 in the same way.
        wide = fields.get("rescale_betas_zero_snr") or fields.get("solver_order") == 3
        limit = 3e-5 if wide else 1e-5
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
    "HeunDiscrete",
    "DPMSolverSinglestep",
)
CROSSING = [info for info in names() if info.scheduler[:4] not in ("Flow", "Flas", "UnCL")]


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("info", CROSSING, ids=lambda info: info.name)
@pytest.mark.parametrize("saved", [True, False], ids=["file", "memory"])
def test_configurations_cross_over(
    info: Any, origin: str, saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another sampler's configuration, a table equals ``from_config``, hidden fields or not."""
    fields = {name: SD[name] for name in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
    if info.name in ("ddim", "pndm"):  # defaults that cannot be honoured
        fields |= {"clip_sample": False, "skip_prk_steps": True}
    if info.scheduler == "UniPCMultistepScheduler":  # without, it is infinite at the last sigma of 0
        fields |= {"lower_order_final": True}
    kind = getattr(diffusers, f"{origin}Scheduler")
    source = kind.from_config(fields)
    config = json.loads(source.to_json_string()) if saved else dict(source.config)
    assert ("_use_default_values" in config) is not saved
    table = make_table(config, info.name, 10, history=HISTORY)
    target = scheduler_class(info.name).from_config(source.config if not saved else config, **info.overrides)
    arguments = {"eta": 0.0} if info.name == "tcd" else {}
    # diffusers finds the lower sigma of an ancestral step by a difference in float32.
    limit = 1e-4 if info.name.startswith("dpm2_a") else 1e-6
    assert error_of(table, target, 10, monkeypatch, slack=limit * 1e2, **arguments) <= limit


@pytest.mark.parametrize(
    "sampler",
    [
        *("ddim", "ddpm", "euler_a", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2s", "lms", "heun", "dpm2"),
        *("dpm2_a", "deis", "unipc", "lcm", "tcd", "dpmpp_sde"),
    ],
)
def test_seeds_of_diffusers(sampler: str) -> None:
    """In float32 and with our random stream, from the latents on, the sample is that of diffusers."""
    shape, eta = (1, 4, 8, 8), 0.5 if sampler in ("ddim", "tcd") else 0.0
    info = find(sampler)
    table = make_table(SD, sampler, 4, history=HISTORY, eta=eta)
    stream = Noise(11)
    sample = stream.normal(shape) * np.float32(table.init_noise_sigma)
    history = np.zeros((HISTORY, *shape), np.float32)
    noise, draws = np.zeros((1, *shape), np.float32), Draws([stream])
    for row in range(len(table.timesteps)):
        p, q = table.to_prediction[row]
        prediction = p * sample + q * np.tanh(sample * table.input_scale[row])
        if table.draws[row]:
            draws.fill(noise, float(table.echoes[row]))
        terms = np.stack([sample, prediction, noise[0], *history])
        sample = np.tensordot(table.update[row, :-1], terms, 1)
        history = np.concatenate([prediction[None], history[:-1]])
    scheduler = scheduler_class(sampler).from_config(SD, **info.overrides)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(11)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = Brownian(lambda: torch.randn(shape, generator=generator))
    extra: dict[str, Any] = {"eta": eta} if eta else {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = generator
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    latents = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = torch.tanh(scheduler.scale_model_input(latents, t))
        latents = scheduler.step(output, t, latents, **extra).prev_sample
    share = (
        4e-6 if sampler in ("dpm2_a", "dpmpp_sde") else 1e-6
    )  # diffusers finds its lower sigma by a difference
    np.testing.assert_allclose(sample, latents.numpy(), rtol=0, atol=share * max(10, np.abs(sample).max()))
