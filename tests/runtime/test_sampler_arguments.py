"""What a table is asked for beside its configuration: churn, eta, order, schedules of one's own, flows."""

from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import pytest

from allaprima.bundle.errors import RequestError
from allaprima.runtime.samplers import count_steps, find, make_table

from .trajectories import HISTORY, PREDICTIONS, SD, SPACINGS, STEPS, error_of, scheduler_class

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
# "Align your steps", for Stable Diffusion 1.5.
ALIGNED = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
SIGMAS = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]


def scheduler_of(sampler: str, config: Mapping[str, Any]) -> Any:
    return getattr(diffusers, find(sampler).scheduler).from_config(config)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "churn",
    [
        {"s_churn": 5.0},
        {"s_churn": 100.0, "s_noise": 1.003},
        {"s_churn": 20.0, "s_tmin": 0.02, "s_tmax": 1.0, "s_noise": 0.9},
        {"s_churn": 20.0, "s_tmin": 100.0},
    ],
    ids=str,
)
def test_euler_with_churn(
    churn: Mapping[str, float], prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spacing, steps in zip(SPACINGS * 2, STEPS, strict=True):
        config = {**SD, "prediction_type": prediction, "timestep_spacing": spacing}
        table = make_table(config, "euler", steps, history=0, **churn)
        if steps > 2:
            assert table.draws.any() == (churn.get("s_tmin", 0) < 14)
            assert table.draws.all() == ("s_tmin" not in churn)
        # diffusers keeps the sample in float32 here.
        assert error_of(table, scheduler_of("euler", config), steps, monkeypatch, **churn) <= 2e-6


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_of_lms(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in STEPS:
        table = make_table(SD, "lms", steps, history=order - 1, order=order)
        assert error_of(table, scheduler_of("lms", SD), steps, monkeypatch, order=order) <= 2e-6


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.1, 0.3, 1.0])
def test_gamma_of_tcd(eta: float, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**SD, "prediction_type": prediction}
    for steps in STEPS:
        table = make_table(config, "tcd", steps, history=0, eta=eta)
        assert error_of(table, scheduler_of("tcd", config), steps, monkeypatch, eta=eta) <= 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("clip", [True, False])
def test_unclip(clip: bool, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"prediction_type": prediction, "clip_sample": clip, "clip_sample_range": 2.0}
    for steps in STEPS[1:]:
        table = make_table(config, "unclip", steps, history=0)
        assert error_of(table, scheduler_of("unclip", config), steps, monkeypatch) <= 1e-6
    with pytest.raises(RequestError, match="num_inference_steps 1 is out of range: sampler 'unclip'"):
        make_table(config, "unclip", 1, history=0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"shift": 3.0},
        {"shift_terminal": 0.1},
        {"invert_sigmas": True},
        {"stochastic_sampling": True, "shift": 2.0},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
    ],
    ids=str,
)
def test_flow_euler(fields: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**FLOW, **fields}
    for steps in STEPS:
        if steps == 1 and "shift_terminal" in fields:
            continue  # nothing to stretch: diffusers divides by zero
        table = make_table(config, None, steps, history=0)
        assert error_of(table, scheduler_of("flow_euler", config), steps, monkeypatch) <= 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_heun(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**FLOW, "shift": shift}
    for steps in STEPS:
        table = make_table(config, "flow_heun", steps, history=1)
        assert error_of(table, scheduler_of("flow_heun", config), steps, monkeypatch) <= 1e-6


def test_shift_of_a_flow() -> None:
    """Published schedules: a shift of 3 counts at the lower end, too."""
    table = make_table({**FLOW, "shift": 3.0}, None, 4, history=0)
    np.testing.assert_allclose(table.timesteps, [1000, 857.692, 602.151, 8.92857], rtol=1e-5)
    table = make_table(FLOW, None, 4, history=0)
    np.testing.assert_allclose(table.timesteps, [1000, 667, 334, 1], rtol=1e-5)


@pytest.mark.parametrize(
    "sampler", ["ddpm", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "lcm", "tcd"]
)
def test_custom_timesteps(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(SD, sampler, None, history=HISTORY, timesteps=ALIGNED)
    config = {**SD, **find(sampler).overrides}
    arguments = {"eta": 0.0} if sampler == "tcd" else {}
    scheduler, custom = scheduler_of(sampler, config), {"timesteps": ALIGNED}
    assert error_of(table, scheduler, 10, monkeypatch, custom, **arguments) <= 1e-6


def test_custom_sigmas(monkeypatch: pytest.MonkeyPatch) -> None:
    for sigmas in (SIGMAS, [*SIGMAS[:-1], 0.0], [2.0, 0.0]):
        table = make_table(SD, "euler", len(sigmas) - 1, history=0, sigmas=sigmas)
        scheduler = scheduler_of("euler", SD)
        assert error_of(table, scheduler, 10, monkeypatch, {"sigmas": sigmas}) <= 1e-6


@pytest.mark.parametrize(
    "custom", [{"sigmas": [1.0, 0.7, 0.2]}, {"timesteps": [900.0, 450.5, 30.0]}], ids=str
)
def test_custom_schedule_of_a_flow(
    custom: Mapping[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**FLOW, "shift": 2.0}
    table = make_table(config, None, None, history=0, **custom)
    assert error_of(table, scheduler_of("flow_euler", config), 3, monkeypatch, custom) <= 1e-6
    if "sigmas" in custom:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
        table = make_table(flow, "unipc", 3, history=HISTORY, **custom)
        given = {"sigmas": np.array(custom["sigmas"])}
        assert error_of(table, scheduler_of("unipc", flow), 3, monkeypatch, given) <= 1e-6


@pytest.mark.parametrize(
    ("sampler", "arguments", "message"),
    [
        ("euler", {"timesteps": [1, 2]}, r"timesteps \[1, 2\] must descend"),
        ("euler", {"timesteps": [5, -1]}, "must not be negative"),
        ("euler", {"timesteps": []}, "not a list of finite numbers"),
        ("euler", {"timesteps": ["a"]}, "are not numbers"),
        ("euler", {"sigmas": [float("nan"), 0]}, "not a list of finite numbers"),
        ("euler", {"sigmas": [2, 0], "timesteps": [5]}, "exclude each other"),
        ("euler", {"sigmas": [2.0]}, "num_inference_steps 0 is out of range"),
        ("heun", {"sigmas": [2, 0]}, "sigmas .* means nothing to sampler 'heun'.* choose one of 'euler'"),
        ("lms", {"timesteps": [5]}, "timesteps .* means nothing to sampler 'lms'"),
        ("dpmpp_2m", {"timesteps": [1000, 3]}, "from timestep 1000 to 3, but"),
        ("dpmpp_2m_karras", {"timesteps": [3]}, "means nothing to sampler 'dpmpp_2m_karras'"),
        ("unipc", {"sigmas": [3]}, "custom sigmas with the scheduler option use_flow_sigmas=False"),
        ("euler_a", {"s_churn": 1.0}, r"s_churn 1\.0 means nothing to sampler 'euler_a'"),
        ("euler", {"order": 2}, "order 2 means nothing to sampler 'euler'.* choose one of 'lms'"),
        ("lms", {"order": 5}, "order 5 is out of range"),
        ("euler", {"s_churn": -1.0}, r"s_churn -1\.0, .* must not be negative"),
        ("euler", {"s_tmin": 2.0, "s_tmax": 1.0}, "nor s_tmin above s_tmax"),
        ("euler", {"s_churn": "5"}, "s_churn '5' is not a number"),
        ("euler", {"s_churn": float("inf")}, "nor the first two infinite"),
        ("heun", {"s_noise": 1.1}, r"s_noise 1\.1 means nothing to sampler 'heun'.* 'euler', .* 'dpmpp_sde'"),
        ("ddim", {"s_tmax": 3.0}, r"s_tmax 3\.0 means nothing to sampler 'ddim'"),
        ("euler", {"options": {"timestep_spacin": 1}}, "did you mean 'timestep_spacing'"),
        ("euler", {"options": {"clip_sample": True}}, "'clip_sample' means nothing to sampler 'euler'"),
        ("euler", {"options": ["a"]}, "are not a mapping"),
        ("euler_karras", {"options": {"use_karras_sigmas": False}}, "contradicts sampler 'euler_karras'"),
        ("flow_heun", {"options": {"use_karras_sigmas": True}}, "cannot honour the configuration"),
    ],
)
def test_what_makes_no_sense(sampler: str, arguments: Mapping[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_table(SD, sampler, None, history=HISTORY, **arguments)


def test_custom_schedule_beside_options() -> None:
    with pytest.raises(RequestError, match="num_inference_steps 5 contradicts the custom schedule of 10"):
        make_table(SD, "euler", 5, history=0, timesteps=ALIGNED)
    with pytest.raises(RequestError, match=r"'heun' cannot take custom timesteps .* use_karras_sigmas"):
        make_table({**SD, "use_karras_sigmas": True}, "heun", 10, history=1, timesteps=ALIGNED)
    with pytest.raises(RequestError, match=r"'dpmpp_2m' cannot take custom timesteps .* use_lu_lambdas"):
        make_table({**SD, "use_lu_lambdas": True}, "dpmpp_2m", 10, history=1, timesteps=ALIGNED)
    with pytest.raises(RequestError, match="num_inference_steps None is not an integer"):
        make_table(SD, "euler", None, history=0)


def test_options_of_a_request() -> None:
    """They count more than the configuration, even where it is a default that ``from_config`` would drop."""
    config = {**SD, "timestep_spacing": "leading", "_use_default_values": ["timestep_spacing"]}
    for options in ({"timestep_spacing": "trailing"}, {"use_karras_sigmas": True, "sigma_max": 9}):
        table = make_table(config, "euler", 5, history=0, options=options)
        wanted = make_table({**SD, **options}, "euler", 5, history=0)
        assert np.array_equal(table.timesteps, wanted.timesteps)
        assert np.array_equal(table.update, wanted.update)
    beta = make_table(SD, "Euler Beta", 5, history=0)
    assert beta.sampler == "euler_beta"
    assert np.array_equal(
        beta.update, make_table(SD, "euler", 5, history=0, options={"use_beta_sigmas": True}).update
    )


def test_number_of_steps() -> None:
    assert count_steps(SD, "euler", None, sigmas=SIGMAS) == 10
    assert count_steps(SD, "heun", 10, timesteps=ALIGNED) == 10
    assert count_steps(FLOW, None, None, sigmas=[1.0, 0.5]) == 2
    assert count_steps(SD, "ddim", 7) == 7
    with pytest.raises(RequestError, match=r"timesteps .* means nothing to sampler 'ddim'"):
        count_steps(SD, "ddim", None, timesteps=ALIGNED)


@pytest.mark.parametrize("s_noise", [0.0, 1.1])
def test_noise_of_dpmpp_sde(s_noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(SD, "dpmpp_sde", 5, history=1, s_noise=s_noise)
    scheduler = scheduler_class("dpmpp_sde").from_config(SD)
    assert error_of(table, scheduler, 5, monkeypatch, s_noise=s_noise) <= 1e-6
