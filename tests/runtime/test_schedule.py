"""Tables of schedules against those of diffusers and of PyTorch."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from allaprima.bundle.errors import RequestError
from allaprima.runtime.samplers.ddim import DDIMOptions
from allaprima.runtime.samplers.euler import EulerOptions
from allaprima.runtime.schedule import (
    Training,
    exponential_sigmas,
    given_fields,
    karras_sigmas,
    read_options,
    sigmas_of,
    spaced_timesteps,
    timesteps_of,
    training_alphas,
    training_betas,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
VECTORISED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.mark.parametrize("count", [1, 2, 7, 999, 1000])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_betas_and_alphas_of_diffusers(schedule: str, count: int) -> None:
    config = {**SD, "beta_schedule": schedule, "num_train_timesteps": count}
    options, expected = read_options(DDIMOptions, config), diffusers.DDIMScheduler.from_config(config)
    betas, alphas = training_betas(options), training_alphas(options)
    assert betas.dtype == alphas.dtype == np.float32
    if VECTORISED:
        np.testing.assert_array_equal(betas, expected.betas.numpy())
        np.testing.assert_array_equal(alphas, expected.alphas_cumprod.numpy())
    np.testing.assert_allclose(alphas, expected.alphas_cumprod.numpy(), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_zero_terminal_snr(schedule: str) -> None:
    config = {**SD, "beta_schedule": schedule, "rescale_betas_zero_snr": True}
    options, expected = read_options(DDIMOptions, config), diffusers.DDIMScheduler.from_config(config)
    alphas = training_alphas(options, zero_snr=True)
    np.testing.assert_allclose(alphas, expected.alphas_cumprod.numpy(), rtol=1e-5)
    assert alphas[-1] == 0
    assert training_alphas(options, zero_snr=True, positive=True)[-1] == 2.0**-24


def test_known_numbers() -> None:
    alphas = training_alphas(read_options(Training, SD))
    expected = [0.99914998, 0.99829602, 0.27633247, 0.0057754959, 0.0046600951]
    np.testing.assert_allclose(alphas[[0, 1, 500, 981, 999]], expected, rtol=1e-7)
    cosine = read_options(Training, {"beta_schedule": "squaredcos_cap_v2"})
    np.testing.assert_allclose(training_betas(cosine)[[0, 999]], [4.128422e-5, 0.999], rtol=1e-6)
    assert sigmas_of(alphas)[-1] == pytest.approx(14.61465, rel=1e-6)


def test_trained_betas() -> None:
    options = read_options(Training, {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 1]})
    np.testing.assert_allclose(training_alphas(options), [0.9, 0.72, 0], rtol=1e-6)
    with pytest.raises(RequestError, match="trained_betas has 1 entries, num_train_timesteps is 1000"):
        training_betas(read_options(Training, {"trained_betas": [0.1]}))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 3, 7, 30, 999])
def test_spacings(spacing: str, steps: int) -> None:
    config = {**SD, "timestep_spacing": spacing, "steps_offset": 1}
    scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    timesteps = spaced_timesteps(read_options(EulerOptions, config), steps)
    np.testing.assert_array_equal(timesteps.astype(np.float32), scheduler.timesteps.numpy())


def test_sigmas() -> None:
    table = sigmas_of(training_alphas(read_options(Training, SD)))
    low, high = float(table[0]), float(table[-1])
    for sigmas in (karras_sigmas(low, high, 9), exponential_sigmas(low, high, 9)):
        assert sigmas[[0, -1]] == pytest.approx([high, low])
        assert np.all(np.diff(sigmas) < 0)
    assert karras_sigmas(low, high, 1).tolist() == pytest.approx([high])
    np.testing.assert_allclose(
        timesteps_of(table[::-100].astype(np.float64), table), np.arange(999, 0, -100), atol=1e-3
    )
    assert timesteps_of(np.array([0.0, 1e-5, 1e5]), table).tolist() == [0, 0, 999]


def test_fields_that_nobody_set() -> None:
    config: dict[str, Any] = {
        "_class_name": "X",
        "beta_end": 0.5,
        "steps_offset": 3,
        "_use_default_values": ["beta_end"],
    }
    assert given_fields(config) == {"steps_offset": 3}
    options = read_options(Training, config)
    assert (options.beta_end, options.steps_offset) == (0.02, 3)


def test_integers_stand_for_floats() -> None:
    options = read_options(Training, {"beta_start": 0})
    assert isinstance(options.beta_start, float)
    with pytest.raises(RequestError, match="beta_start=True is ill-typed: it must be float"):
        read_options(Training, {"beta_start": True})
    with pytest.raises(RequestError, match="trained_betas='x' is ill-typed"):
        read_options(Training, {"trained_betas": ["x"]})
