"""The sampler of Kandinsky Flash against a loop of its own, and the tables of Kandinsky 3."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from allaprima.bundle import RequestError
from allaprima.runtime.samplers import find, make_table

F64 = NDArray[np.float64]

# scheduler_config.json of Kandinsky 3.
KANDINSKY: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def cosine_alphas() -> F64:
    """Cumulative products of Nichol and Dhariwal 2021, equation 17, with betas of at most 0.999."""
    level = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.asarray(np.cumprod(1 - np.minimum(1 - level[1:] / level[:-1], 0.999)))


def model(sample: F64, timestep: float) -> F64:
    return np.tanh(sample) * 0.8 + timestep / 5000


def loop(timesteps: tuple[int, ...], start: F64, noises: Callable[[], F64]) -> F64:
    """Noise what was seen last, look, and take what is seen."""
    alphas, sample = cosine_alphas(), start
    clean = sample
    for index, timestep in enumerate(timesteps):
        alpha = alphas[timestep]
        if index:
            sample = np.sqrt(alpha) * clean + np.sqrt(1 - alpha) * noises()
        clean = (sample - np.sqrt(1 - alpha) * model(sample, timestep)) / np.sqrt(alpha)
    return clean


def run(table: Any, sample: F64, noises: Callable[[], F64]) -> F64:
    """What a denoiser does with a table that needs no history."""
    for row, timestep in enumerate(table.timesteps):
        p, q = table.to_prediction[row].astype(np.float64)
        raw = p * sample + q * model(sample, float(timestep))
        prediction = np.clip(raw, -table.bounds[row], table.bounds[row])
        noise = noises() if table.draws[row] else 0.0
        u = table.update[row].astype(np.float64)
        assert not u[3:].any()
        sample = u[0] * sample + u[1] * prediction + u[2] * noise
    return sample


@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [(4, (979, 729, 479, 229)), (1, (979,)), (2, (979, 479)), (8, (979, 854, 729, 604, 479, 354, 229, 104))],
)
def test_it_is_the_loop(steps: int, timesteps: tuple[int, ...]) -> None:
    table = make_table(KANDINSKY, "flash", steps, history=4)
    assert table.timesteps.tolist() == list(timesteps)
    assert table.draws.sum() == steps - 1
    first, second = (np.random.default_rng(3) for _ in range(2))
    start = first.standard_normal((4, 6, 5))
    assert (start == second.standard_normal(start.shape)).all()
    wanted = loop(timesteps, start, lambda: first.standard_normal(start.shape))
    found = run(table, start, lambda: second.standard_normal(start.shape))
    assert np.abs(wanted).max() > 1.5, "a clamp would show"
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_it_begins_with_a_picture() -> None:
    """At the level of the timestep that is left."""
    table = make_table(KANDINSKY, "flash", 4, history=4, begin=2)
    assert table.timesteps.tolist() == [479, 229]
    assert table.levels is not None
    alpha = cosine_alphas()[479]
    np.testing.assert_allclose(table.levels[0], np.sqrt([alpha, 1 - alpha]), rtol=1e-5)


def test_its_names_and_limits() -> None:
    assert find("Kandinsky Flash").name == find("FlashScheduler").name == "flash"
    assert make_table({**KANDINSKY, "_class_name": "FlashScheduler"}, None, 4, history=0).sampler == "flash"
    assert len(make_table(KANDINSKY, "flash", 47, history=0).timesteps) == 47
    with pytest.raises(
        RequestError, match="num_inference_steps 48 is out of range: sampler 'flash' takes 1 to 47"
    ):
        make_table(KANDINSKY, "flash", 48, history=0)
    own = make_table(KANDINSKY, "flash", None, history=0, timesteps=[999, 500, 10])
    assert own.timesteps.tolist() == [999, 500, 10]


def test_tables_of_kandinsky_3() -> None:
    """25 steps of its own sampler, as numbers."""
    table = make_table(KANDINSKY, None, 25, history=4)
    assert table.timesteps.tolist() == [*range(961, 40, -40), 1]
    assert set(table.bounds.tolist()) == {1.0}
    assert table.init_noise_sigma == 1
    assert table.draws.all(), "noise is drawn even for the last step"
    for row, (p, q, clean, sample, noise) in {
        0: (16.8957391, -16.8661199, 0.092696075, 0.482609439, 0.867870976),
        1: (8.24673926, -8.18588471, 0.103981449, 0.650512298, 0.741361758),
    }.items():
        np.testing.assert_allclose(table.to_prediction[row], [p, q], rtol=1e-5)
        np.testing.assert_allclose(table.update[row, :3], [sample, clean, noise], rtol=1e-5)
    np.testing.assert_allclose(table.update[-1, :3], [0, 1, 1e-10], rtol=1e-5, atol=1e-12)
