"""What a request asks of its sampler, in pictures, against diffusers' StableDiffusionPipeline."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray

from allaprima.bundle import BackendError, Bundle, Component, RequestError
from allaprima.engine.tensorrt import choose_flavour
from allaprima.export import parity
from allaprima.export.denoiser import Denoiser
from allaprima.export.graph import write_graph
from allaprima.export.source import open_checkpoint
from allaprima.export.stable_diffusion import read_family
from allaprima.export.update import THRESHOLDING, VARIANCE, quantile
from allaprima.runtime import Pipeline, Sampling, open_session
from allaprima.runtime.samplers import find

from .test_parity import psnr

Pictures = NDArray[np.uint8]
SETTINGS: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 3.0, "width": 96, "height": 64}
PROMPT = {"prompt": "a red circle", "negative_prompt": "dark"}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.5}
ALIGNED = [999, 850, 645, 455, 233, 24]


@pytest.fixture(scope="module", params=["ort", "openvino"])
def pipeline(request: pytest.FixtureRequest, tiny_bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_bundle.folder, backend=request.param, precision="fp32", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def learned_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a UNet that predicts variances, and a scheduler that thresholds."""
    folder = tmp_path_factory.mktemp("checkpoints") / "learned"
    shutil.copytree(tiny_checkpoint, folder)
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    wide = UNet2DConditionModel.from_config({**unet.config, "out_channels": 8})
    with torch.no_grad():
        for weight in wide.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    wide.save_pretrained(folder / "unet")
    path = folder / "scheduler" / "scheduler_config.json"
    options = {**THRESHOLD, "variance_type": "learned_range", "_class_name": "DDPMScheduler"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "scheduler": ["diffusers", "DDPMScheduler"]})
    )
    return folder


@pytest.fixture(scope="module")
def learned_denoiser(
    learned_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Component]:
    """Its denoiser: graph and description."""
    family = read_family(open_checkpoint(str(learned_checkpoint)))
    assert family.options == (*THRESHOLDING, *VARIANCE)
    path = tmp_path_factory.mktemp("learned") / "model.onnx"
    plan = family.plans(torch.float32)["denoiser"]()
    write_graph(plan, path)
    trials = parity.reference(plan, [{"B": 2, "G": 2, "H": 6, "W": 4, "L": 77}])
    errors = parity.check("denoiser", path, "fp32", trials)
    return path, Component("model.onnx", "fp32", plan.inputs, plan.outputs, errors)


@pytest.fixture(scope="module", params=["ort", "openvino"])
def learned(
    request: pytest.FixtureRequest,
    tiny_bundle: Bundle,
    learned_checkpoint: Path,
    learned_denoiser: tuple[Path, Component],
) -> Iterator[Pipeline]:
    """A pipeline with that denoiser between the tiny encoder and decoder, which are the same."""
    backend = request.param
    scheduler = read_family(open_checkpoint(str(learned_checkpoint))).scheduler
    bundle = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, scheduler=scheduler))
    with Pipeline.open(tiny_bundle.folder, backend=backend, precision="fp32", threads=1) as opened:
        session = open_session(*learned_denoiser, backend, precision="fp32", threads=1)
        yield Pipeline(bundle, {**vars(opened)["_components"].sessions, "denoiser": session}, backend=backend)
        session.close()


def reference_of(folder: Path) -> Any:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.own = pipeline.scheduler.config  # what every test starts from
    return pipeline


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Any:
    return reference_of(tiny_checkpoint)


@pytest.fixture(scope="module")
def learned_reference(learned_checkpoint: Path) -> Any:
    return reference_of(learned_checkpoint)


def paint(reference: Any, scheduler: str, options: Mapping[str, Any], **settings: Any) -> Pictures:
    """With a scheduler made of the checkpoint's configuration and options, as users of diffusers do it."""
    reference.scheduler = getattr(diffusers, scheduler).from_config(
        reference.own, **{"clip_sample": False, **options}
    )
    generator = torch.Generator("cpu").manual_seed(11)
    made = reference(**PROMPT, generator=generator, output_type="np", **settings)
    picture: Pictures = (made.images[0] * 255).round().astype(np.uint8)
    return picture


def generate(pipeline: Pipeline, sampler: str, sampling: Any, **settings: Any) -> Pictures:
    result = pipeline.generate(**PROMPT, sampler=sampler, seed=11, sampling=sampling, **settings)
    return np.asarray(result.images[0])


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddim", {"clip_sample": True, "clip_sample_range": 0.5}),
        ("lcm", {"thresholding": True}),
        ("euler", {"timestep_spacing": "trailing", "use_karras_sigmas": True}),
        ("dpmpp_2m", {"use_beta_sigmas": True, "solver_order": 3}),
    ],
)
def test_scheduler_options(
    reference: Any, pipeline: Pipeline, sampler: str, options: Mapping[str, Any]
) -> None:
    kind = find(sampler).scheduler
    wanted = paint(reference, kind, options, **SETTINGS)
    without = paint(reference, kind, {}, **SETTINGS)
    got = generate(pipeline, sampler, {"scheduler": options}, **SETTINGS)
    assert psnr(wanted, got) >= max(50, psnr(wanted, without) + 10)


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        ("dpmpp_2m", {"timesteps": ALIGNED}),
        ("heun", {"timesteps": ALIGNED}),
        ("euler", {"sigmas": [14.6, 4.1, 1.6, 0.7, 0.2, 0.0]}),
    ],
)
def test_schedules_of_ones_own(
    reference: Any, pipeline: Pipeline, sampler: str, schedule: Mapping[str, Any]
) -> None:
    settings = {name: value for name, value in SETTINGS.items() if name != "num_inference_steps"}
    wanted = paint(reference, find(sampler).scheduler, {}, **schedule, **settings)
    assert psnr(wanted, generate(pipeline, sampler, Sampling(**schedule), **settings)) >= 50


@pytest.mark.parametrize(
    ("options", "guidance"), [({}, 3.0), ({}, 1.0), ({"thresholding": False}, 3.0)], ids=str
)
def test_learned_variance(
    learned_reference: Any, learned: Pipeline, options: Mapping[str, Any], guidance: float
) -> None:
    """With thresholding, as the checkpoint says, or without."""
    settings = {**SETTINGS, "guidance_scale": guidance}
    wanted = paint(learned_reference, "DDPMScheduler", options, **settings)
    assert psnr(wanted, generate(learned, "ddpm", {"scheduler": options}, **settings)) >= 50


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddim", {}),
        ("ddim", {"thresholding": False, "clip_sample": True}),
        ("deis", {}),
        ("dpmpp_2m", {"variance_type": None}),
        ("euler", {}),
    ],
    ids=str,
)
def test_learned_variance_left_aside(
    learned_reference: Any,
    learned: Pipeline,
    sampler: str,
    options: Mapping[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By samplers that have no use for it; thresholding stays, and where it is off nothing changes."""
    unet = learned_reference.unet
    whole = unet.forward
    monkeypatch.setattr(unet, "forward", lambda *inputs, **named: (whole(*inputs, **named)[0][:, :4],))
    wanted = paint(learned_reference, find(sampler).scheduler, options, **SETTINGS)
    chosen = {name: value for name, value in options.items() if name != "variance_type"}
    assert psnr(wanted, generate(learned, sampler, {"scheduler": chosen}, **SETTINGS)) >= 50


def test_tensorrt_rtx_takes_it(learned_denoiser: tuple[Path, Component]) -> None:
    """Each operator of it, the quantile's too."""
    try:
        choose_flavour("tensorrt-rtx")
    except BackendError as error:
        pytest.skip(str(error))
    from polygraphy.backend.trt import NetworkFromOnnxPath

    builder, network, parser = NetworkFromOnnxPath(str(learned_denoiser[0]))()
    operators = {node.op_type for node in onnx.load(learned_denoiser[0], load_external_data=False).graph.node}
    assert parser.num_errors == 0
    assert [name for name in operators if not parser.supports_operator(name)] == []
    del parser, network, builder  # in this order: each borrows the next


def test_a_denoiser_that_cannot(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match=r"option thresholding is more .* again with --thresholding"):
        generate(pipeline, "ddim", {"scheduler": THRESHOLD}, **SETTINGS)
    with pytest.raises(RequestError, match=r"option variance_type is more .* predicts no variance"):
        generate(pipeline, "ddpm", {"scheduler": {"variance_type": "learned_range"}}, **SETTINGS)


@pytest.mark.parametrize("guided", [True, False])
def test_variance_under_guidance(guided: bool) -> None:
    """That of the last branch, or of both branches together."""

    class Network(torch.nn.Linear):
        def forward(self, *_: Any, **__: Any) -> tuple[torch.Tensor]:  # type: ignore[override]
            return (made,)

    made = torch.randn(2 * 3, 4, 2, 2)
    module = Denoiser(Network(1, 1), options=["learned_variance"], guided_variance=guided)
    one, noise = torch.ones(3), torch.randn(3, 2, 2, 2)
    update = torch.tensor([[0.0, 0.0, 0.5, 0.0, 0.0]]).expand(3, -1)
    weights = torch.tensor([[-1.5], [2.5]]).expand(2, 3)
    zero = torch.zeros(3, 2, 2, 2)
    inputs = (zero, zero[None], noise, one, one, weights, torch.ones(3, 2), one, update, torch.zeros(6, 1, 1))
    learned = torch.tensor([[0.3, 0.2]]).expand(3, -1)
    got, _ = module(*inputs, torch.zeros(3), learned)
    branches = made[:, 2:].unflatten(0, (2, 3))
    variance = 2.5 * branches[1] - 1.5 * branches[0] if guided else branches[1]
    wanted = (0.5 * torch.exp(0.3 * variance) + 0.2 * variance.clamp(min=0).sqrt()) * noise
    torch.testing.assert_close(got, wanted)


def test_quantile() -> None:
    torch.manual_seed(0)
    for count in (2, 7, 5000):
        values = torch.randn(5, count).abs() * torch.tensor([1e-3, 0.5, 1, 3, 100.0]).unsqueeze(1)
        values[1, : count // 2] = values[1, 0]  # many equal ones
        for ratio in (0.0, 0.3, 0.9, 0.995, 1.0):
            got, wanted = quantile(values, torch.full((5,), ratio)), torch.quantile(values, ratio, dim=1)
            torch.testing.assert_close(got, wanted, rtol=2e-6, atol=1e-7)
    assert quantile(torch.zeros(1, 4), torch.tensor([0.5])).tolist() == [0]
    assert torch.isfinite(quantile(torch.rand(1, 4), torch.tensor([-1.0]))).all()
