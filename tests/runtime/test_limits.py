"""What is not linear in a sampler, against diffusers: clamps, dynamic thresholding, learned variance."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from allaprima.runtime.samplers import make_table

from .trajectories import HISTORY, PREDICTIONS, SD, error_of, scheduler_class

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",
    "ignore:__array_wrap__:DeprecationWarning",
    "ignore:.*algorithm_type.*is deprecated:FutureWarning",
)
CLIP = {"clip_sample": True, "clip_sample_range": 1.5}
# At these values some of a trajectory is limited by the quantile, some by each end.
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0}
PLAIN = {"final_sigmas_type": "sigma_min", "algorithm_type": "dpmsolver"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ddim", CLIP),
    *((name, THRESHOLD) for name in ("ddim", "ddpm", "lcm", "dpmpp_2m", "dpmpp_2s", "deis", "unipc")),
    ("ddim", {"thresholding": True, "clip_sample": True, "clip_sample_range": 0.5}),
    ("deis", {"thresholding": True}),
    ("dpmpp_2m", {**PLAIN, **THRESHOLD}),
    ("dpmpp_2m", {**THRESHOLD, "algorithm_type": "sde-dpmsolver++"}),
    ("unipc", {**THRESHOLD, "predict_x0": False, "final_sigmas_type": "sigma_min"}),
    ("tcd", {**THRESHOLD, **CLIP}),
    ("ddpm", {"variance_type": "learned_range"}),
    ("ddpm", {"variance_type": "learned"}),
    ("ddpm", {"variance_type": "learned_range", **THRESHOLD}),
    ("unclip", {**COSINE, "variance_type": "learned_range"}),
    ("unclip", {**COSINE, "variance_type": "learned_range", **CLIP}),
)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "fields"), CASES, ids=lambda value: str(value))
def test_trajectory_of_diffusers(
    sampler: str, fields: Mapping[str, Any], prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampler == "unclip" and prediction == "v_prediction":
        pytest.skip("diffusers has not implemented it")
    config = {**SD, **fields, "prediction_type": prediction}
    arguments = {"eta": 0.5} if sampler in ("ddim", "tcd") else {}
    for steps in (2, 5, 20):
        table = make_table(config, sampler, steps, history=HISTORY, **arguments)
        scheduler = scheduler_class(sampler).from_config(config)
        error = error_of(table, scheduler, steps, monkeypatch, **arguments)
        assert error <= (5e-6 if sampler in ("deis", "dpmpp_2m") else 1e-6), (steps, error)


def test_threshold_of_plain_singlestep() -> None:
    """diffusers fails there; at order 1 it must be what multistep is."""
    config = {**SD, **PLAIN, **THRESHOLD, "solver_order": 1, "timestep_spacing": "linspace"}
    single, multi = (make_table(config, name, 5, history=0) for name in ("dpmpp_2s", "dpmpp_2m"))
    for name in ("to_prediction", "thresholds", "from_limited", "update"):
        np.testing.assert_allclose(getattr(single, name), getattr(multi, name), rtol=1e-6)


def test_what_a_table_asks_for() -> None:
    """Only what a graph may lack, and a threshold that can only be 1 is a clamp."""
    table = make_table({**SD, **THRESHOLD}, "ddpm", 3, history=0)
    assert table.thresholds is not None
    assert table.thresholds[0].tolist() == pytest.approx([0.9, 3.0])
    assert table.from_limited is table.learned_variance is None
    table = make_table({**SD, "thresholding": True}, "ddpm", 3, history=0)
    assert (table.thresholds, table.bounds.tolist()) == (None, [1, 1, 1])
    table = make_table({**SD, "thresholding": True}, "deis", 3, history=HISTORY)
    assert (table.thresholds, table.from_limited is None) == (None, False)
    table = make_table({**SD, "variance_type": "learned_range"}, "ddpm", 3, history=0)
    assert table.learned_variance is not None
