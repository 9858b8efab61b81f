"""Tables by themselves: names, defaults, what is refused, and what a table promises."""

import dataclasses
import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from allaprima.bundle.errors import RequestError
from allaprima.runtime.samplers import NO_BOUND, SamplerInfo, Table, find, idle_row, make_table, names
from allaprima.runtime.samplers.consistency import LCMOptions, TCDOptions
from allaprima.runtime.samplers.ddim import DDIMOptions, DDPMOptions, UnCLIPOptions
from allaprima.runtime.samplers.deis import DEISOptions
from allaprima.runtime.samplers.dpm import DPMOptions, SinglestepOptions
from allaprima.runtime.samplers.dpm_sde import DPMSDEOptions
from allaprima.runtime.samplers.euler import AncestralOptions, EulerOptions
from allaprima.runtime.samplers.flow import FlowEulerOptions, FlowHeunOptions
from allaprima.runtime.samplers.heun import HeunOptions, KDPM2Options
from allaprima.runtime.samplers.lms import LMSOptions
from allaprima.runtime.samplers.pndm import PNDMOptions
from allaprima.runtime.samplers.unipc import UniPCOptions
from allaprima.runtime.schedule import Training

from .trajectories import SD, scheduler_class

HISTORY = 4

# What a flow has instead: no betas.
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}

OPTIONS = {
    "DDIMScheduler": DDIMOptions,
    "DDPMScheduler": DDPMOptions,
    "PNDMScheduler": PNDMOptions,
    "LMSDiscreteScheduler": LMSOptions,
    "EulerDiscreteScheduler": EulerOptions,
    "EulerAncestralDiscreteScheduler": AncestralOptions,
    "HeunDiscreteScheduler": HeunOptions,
    "KDPM2DiscreteScheduler": KDPM2Options,
    "KDPM2AncestralDiscreteScheduler": KDPM2Options,
    "DPMSolverMultistepScheduler": DPMOptions,
    "DPMSolverSinglestepScheduler": SinglestepOptions,
    "DPMSolverSDEScheduler": DPMSDEOptions,
    "DEISMultistepScheduler": DEISOptions,
    "UniPCMultistepScheduler": UniPCOptions,
    "LCMScheduler": LCMOptions,
    "TCDScheduler": TCDOptions,
    "UnCLIPScheduler": UnCLIPOptions,
    "FlowMatchEulerDiscreteScheduler": FlowEulerOptions,
    "FlowMatchHeunDiscreteScheduler": FlowHeunOptions,
}
COSINE = "squaredcos_cap_v2"
SDE = {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}
# Read by no sampler here, because they matter only beside options that are refused, or not at all.
SILENT = {"time_shift_type"}
UNREAD = {
    LCMOptions: {"set_alpha_to_one"},
    TCDOptions: {
        *("set_alpha_to_one", "clip_sample", "clip_sample_range", "timestep_scaling"),
        *("thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
    },
    DPMSDEOptions: {"noise_sampler_seed"},
    FlowEulerOptions: {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"},
}
# Fields that a class has no parameter for, but reads where another scheduler's configuration left them.
HIDDEN = {"sigma_min", "sigma_max"}
SHARED = {field.name for field in dataclasses.fields(Training)}


@pytest.mark.parametrize(("scheduler", "kind"), OPTIONS.items())
def test_defaults_of_diffusers(scheduler: str, kind: type[Training]) -> None:
    """Our fields and defaults are the parameters of the class, all of them."""
    parameters = inspect.signature(scheduler_class(scheduler).__init__).parameters
    unread = SILENT | UNREAD.get(kind, set()) | {"self"}
    expected = {name: p.default for name, p in parameters.items() if name not in unread}
    ours = {field.name: field.default for field in dataclasses.fields(kind)}
    absent = ours.keys() - expected.keys()
    assert absent <= SHARED | HIDDEN
    if kind is UniPCOptions:
        assert expected.pop("disable_corrector") == []
        del ours["disable_corrector"]
    assert {name: ours[name] for name in ours.keys() - absent} == expected


def test_reference_schedules() -> None:
    """Published schedules of Stable Diffusion, as numbers."""
    pndm = make_table(SD, None, 4, history=HISTORY)
    assert pndm.sampler == "pndm"
    assert pndm.timesteps.tolist() == [751, 501, 501, 251, 1]
    euler = make_table({**SD, "timestep_spacing": "leading"}, "euler", 50, history=0)
    assert euler.timesteps[:2].tolist() == [981, 961]
    assert euler.init_noise_sigma == pytest.approx(13.15847, rel=1e-6)
    karras = make_table(SD, "dpmpp_2m_karras", 20, history=1)
    assert karras.timesteps[:4].tolist() == [999, 962, 921, 876]
    assert karras.update.shape == (20, 5)


def test_trailing_without_a_negative_timestep() -> None:
    """Rounding gives ``arange`` a 62nd element here, at which diffusers runs at timestep -1."""
    table = make_table({**SD, "timestep_spacing": "trailing"}, "euler", 61, history=0)
    assert len(table.timesteps) == 61
    assert table.timesteps.min() >= 0


def config_of(info: SamplerInfo) -> dict[str, Any]:
    """A configuration that the sampler can honour."""
    if info.name.startswith("flow"):
        return FLOW
    return {**SD, "beta_schedule": "squaredcos_cap_v2"} if info.name == "unclip" else SD


def test_table_is_sealed_and_reproducible_by_its_name() -> None:
    for info in names():
        config = config_of(info)
        table = make_table(config, info.title, 7, history=HISTORY)
        again = make_table(config, table.sampler, 7, history=HISTORY)
        assert table.sampler == info.name
        for field in dataclasses.fields(Table):
            value = getattr(table, field.name)
            np.testing.assert_array_equal(value, getattr(again, field.name))
            if isinstance(value, np.ndarray):
                assert value.dtype == (bool if field.name == "draws" else np.float32)
                assert not value.flags.writeable
        assert table.draws.any() == (info.noise == "yes")
        assert len(table.timesteps) == (8 if info.name == "pndm" else 7 * info.calls - (info.calls == 2))
        assert np.any(table.update[:, 3 + info.history :]) == 0
        assert bool(np.any(table.update[:, 3:])) == (info.history > 0)


def test_history_slots() -> None:
    make_table(SD, "dpmpp_2m", 5, history=1)
    with pytest.raises(RequestError, match="'pndm' needs 4 earlier predictions, the denoiser keeps 1"):
        make_table(SD, "pndm", 5, history=1)


def test_clamp_is_a_bound() -> None:
    assert np.all(make_table(SD, "ddpm", 3, history=0).bounds == np.float32(NO_BOUND))
    clipped = make_table({**SD, "clip_sample": True}, "ddpm", 3, history=0)
    assert clipped.bounds.tolist() == [1, 1, 1]


def test_idle_row_is_the_identity() -> None:
    row = idle_row(HISTORY)
    assert row.update.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]]
    assert not row.draws.any()
    assert not np.any([*row.timesteps, *row.input_scale, *row.to_prediction[0]])
    assert np.isfinite(row.bounds).all()


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("DDIM", "ddim"),
        ("ddimscheduler", "ddim"),
        ("PLMS", "pndm"),
        ("Euler", "euler"),
        ("Euler a", "euler_a"),
        ("euler-ancestral", "euler_a"),
        ("EulerAncestralDiscrete", "euler_a"),
        ("EulerDiscreteScheduler", "euler"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("dpm++ 2m karras", "dpmpp_2m_karras"),
        ("DPM-Solver++ 2M SDE Karras", "dpmpp_2m_sde_karras"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde_exponential"),
        ("DPM++ 3M SDE Karras", "dpmpp_3m_sde_karras"),
        ("DPMSolverSinglestepScheduler", "dpmpp_2s"),
        ("Heun", "heun"),
        ("k_heun", "heun"),
        ("LMS Karras", "lms_karras"),
        ("LMSDiscreteScheduler", "lms"),
        ("DPM2 a Karras", "dpm2_a_karras"),
        ("DPM2", "dpm2"),
        ("KDPM2AncestralDiscreteScheduler", "dpm2_a"),
        ("UniPC", "unipc"),
        ("DEISMultistep", "deis"),
        ("LCM", "lcm"),
        ("TCD", "tcd"),
        ("UnCLIPScheduler", "unclip"),
        ("FlowMatchEulerDiscreteScheduler", "flow_euler"),
        ("DPM++ SDE Karras", "dpmpp_sde_karras"),
        ("DPMSolverSDEScheduler", "dpmpp_sde"),
        ("Euler Beta", "euler_beta"),
        ("dpm++_2m_sde_beta", "dpmpp_2m_sde_beta"),
        ("k_euler exponential", "euler_exponential"),
        ("Flow Euler Karras", "flow_euler_karras"),
    ],
)
def test_names(spelling: str, name: str) -> None:
    assert find(spelling).name == name


def test_unknown_sampler() -> None:
    with pytest.raises(
        RequestError, match=r"no sampler 'eulre': did you mean 'euler'\? The samplers are ddim, ddpm"
    ):
        make_table(SD, "eulre", 5, history=HISTORY)
    with pytest.raises(RequestError, match="no sampler ''"):
        find("")


def test_class_without_a_sampler() -> None:
    config = {**SD, "_class_name": "SASolverScheduler"}
    with pytest.raises(RequestError, match="'SASolverScheduler' is not among the samplers: name one of ddim"):
        make_table(config, None, 5, history=HISTORY)
    with pytest.raises(RequestError, match="None is not among"):
        make_table({}, None, 5, history=HISTORY)
    with pytest.raises(RequestError, match="'euler' cannot honour the configuration of a FlowMatchEuler"):
        make_table(FLOW, "euler", 5, history=HISTORY)
    with pytest.raises(RequestError, match="'flow_heun' cannot honour the configuration of a PNDM"):
        make_table(SD, "flow_heun", 5, history=HISTORY)


@pytest.mark.parametrize(
    ("sampler", "fields", "message"),
    [
        ("ddim", {"clip_sample": True, "clip_sample_range": 0}, "clip_sample_range=0.0 is out of range"),
        (
            "ddim",
            {"thresholding": True, "dynamic_thresholding_ratio": 2},
            "dynamic_thresholding_ratio=2.0 is",
        ),
        ("deis", {"thresholding": True, "sample_max_value": -1}, "sample_max_value=-1.0 is out of range"),
        ("ddim", {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ("ddpm", {"variance_type": "fixed_large_log"}, "variance_type='fixed_large_log'"),
        ("ddpm", {"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ("ddpm", {"timestep_spacing": "odd"}, "timestep_spacing='odd'"),
        ("pndm", {"skip_prk_steps": False}, "skip_prk_steps=False"),
        ("euler_karras", {"use_beta_sigmas": True}, "use_karras_sigmas and use_beta_sigmas exclude"),
        ("euler_karras", {"sigma_min": 3, "sigma_max": 2}, "sigma_min=3.0 and sigma_max=2.0 are no range"),
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type='log_linear'"),
        ("euler", {"use_karras_sigmas": True, "use_exponential_sigmas": True}, "exclude each other"),
        ("euler", {"beta_schedule": "exp"}, "beta_schedule='exp'"),
        ("lms", {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ("heun", {"timestep_spacing": "odd"}, "timestep_spacing='odd'"),
        ("dpm2", {"prediction_type": "sample"}, "prediction_type='sample'"),
        ("dpm2_a", {"prediction_type": "sample"}, "prediction_type='sample'"),
        ("dpmpp_2m", {"use_flow_sigmas": True, "use_karras_sigmas": True}, "exclude each other"),
        ("dpmpp_2m", {"use_flow_sigmas": True, "use_lu_lambdas": True}, "exclude each other"),
        ("dpmpp_2m", {"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ("dpmpp_2m", {"algorithm_type": "dpmsolver"}, "'zero' together with algorithm_type='dpmsolver'"),
        ("dpmpp_2m", {**SDE, "solver_order": 3}, "solver_order=3"),
        ("dpmpp_2m", {**SDE, "prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ("dpmpp_2m", {"algorithm_type": "euler"}, "algorithm_type='euler'"),
        ("dpmpp_2s", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order=3"),
        ("dpmpp_sde", {"prediction_type": "sample"}, "prediction_type='sample'"),
        ("dpmpp_2s", SDE, "algorithm_type='sde-dpmsolver'"),
        ("deis", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type='sde-dpmsolver\\+\\+'"),
        ("unipc", {"solver_type": "bh1"}, "solver_type='bh1' and final_sigmas_type='zero'"),
        ("unipc", {"predict_x0": False}, "predict_x0=False and final_sigmas_type='zero'"),
        ("unipc", {"lower_order_final": False}, "lower_order_final=False and final_sigmas_type='zero'"),
        ("unipc", {"solver_order": 4}, "solver_order=4"),
        ("unipc", {"solver_p": "x"}, "solver_p='x'"),
        ("unipc", {"shift_terminal": 0.1}, "shift_terminal=0.1"),
        ("lcm", {"original_inference_steps": 4}, "num_inference_steps 5 .* 1 to 4, the original_inference"),
        ("tcd", {"original_inference_steps": 2000}, "original_inference_steps=2000"),
        ("unclip", {}, "beta_schedule='scaled_linear'"),
        ("unclip", {"beta_schedule": COSINE, "variance_type": "fixed_small"}, "variance_type='fixed_small"),
        ("flow_euler", {**FLOW, "use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ("dpmpp_2m", {"solver_order": 4}, "solver_order=4"),
        ("dpmpp_2m", {"final_sigmas_type": "none"}, "final_sigmas_type='none'"),
        ("dpmpp_2m_karras", {"use_exponential_sigmas": True}, "exclude each other"),
        ("euler", {"steps_offset": "1"}, "steps_offset='1' is ill-typed: it must be int"),
        ("euler", {"use_karras_sigmas": 1}, "use_karras_sigmas=1 is ill-typed: it must be bool or None"),
        ("euler", {"num_train_timesteps": True}, "num_train_timesteps=True is ill-typed"),
        ("euler", {"beta_start": -1}, "not within 0 to 1"),
    ],
)
def test_what_cannot_be_honoured_is_refused(sampler: str, fields: Mapping[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_table({**SD, **fields}, sampler, 5, history=HISTORY)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "20"])
def test_steps_out_of_range(steps: Any) -> None:
    with pytest.raises(RequestError, match="num_inference_steps"):
        make_table(SD, "euler", steps, history=HISTORY)


def test_eta_out_of_range() -> None:
    for eta in (-0.1, 1.1):
        with pytest.raises(RequestError, match=r"eta .* is out of range"):
            make_table(SD, "ddim", 5, history=HISTORY, eta=eta)
    with pytest.raises(RequestError, match="eta nan is not a number"):
        make_table(SD, "ddim", 5, history=HISTORY, eta=float("nan"))
    with pytest.raises(RequestError, match=r"eta 0\.5 means nothing to sampler 'euler'"):
        make_table(SD, "euler", 5, history=HISTORY, eta=0.5)


def test_no_table_of_infinities() -> None:
    config = {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(RequestError, match=r"no finite coefficients .* v_prediction"):
        make_table(config, "ddim", 5, history=HISTORY)
    with pytest.raises(RequestError, match="fewer steps"):
        make_table({**SD, "timestep_spacing": "leading"}, "dpmpp_2m", 1000, history=HISTORY)
    for sampler, order in itertools.product(("dpmpp_2m", "deis", "unipc"), (2, 3)):
        config = {**SD, "timestep_spacing": "linspace", "solver_order": order}  # two timesteps are equal
        with pytest.raises(RequestError, match=r"no finite coefficients .* fewer steps"):
            make_table(config, sampler, 1000, history=HISTORY)


def test_timesteps_beyond_training() -> None:
    with pytest.raises(RequestError, match="from timestep 1000 to 1, but the model knows 999 to 0"):
        make_table(SD, "ddim", 1000, history=HISTORY)
