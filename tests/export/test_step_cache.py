"""Steps with cached deep features: the two graphs against the whole step, and pictures against diffusers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image

from allaprima.bundle import BackendError, Bundle, ExportError, RequestError, open_bundle
from allaprima.engine import Options, build_bundle
from allaprima.engine.tensorrt import choose_flavour
from allaprima.export import export_checkpoint
from allaprima.export.denoiser import Denoiser
from allaprima.export.graph import GraphPlan
from allaprima.export.parity import reference
from allaprima.export.step import plan_step
from allaprima.export.step_cache import DEEP, FEATURES, SHALLOW, check_cut, plan_deep, plan_shallow
from allaprima.export.unclip import ImageDenoiser
from allaprima.runtime import Pipeline, Session, open_session
from allaprima.runtime.components import weigh_files
from allaprima.runtime.samplers import find

from .conftest import write_tiny_kandinsky3
from .test_parity import psnr
from .test_sharing import ATTENDING, PLAIN, make_unet

Arrays = dict[str, NDArray[Any]]
OUTER: dict[str, Any] = {
    "down_block_types": (ATTENDING, PLAIN),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
"""Attention in the outermost level, as Stable Diffusion 1 and 2 have it."""
INNER: dict[str, Any] = {
    "down_block_types": (PLAIN, ATTENDING),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
"""None there, as in SDXL."""
ADDED: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 12 + 6 * 8,
}
UNETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "outer": (OUTER, {}),
    "inner": (INNER, {}),
    "deeper": ({**OUTER, "layers_per_block": 2, "transformer_layers_per_block": 2}, {}),
    "xl": (
        {**INNER, **ADDED},
        {
            "encoder_hidden_states_2": ("G*B", "L", 8),
            "text_embeds": ("G*B", 12),
            "time_ids": ("G*B", 6),
        },
    ),
    "distilled": ({**OUTER, "time_cond_proj_dim": 16}, {"timestep_cond": ("G*B", 16)}),
    "inpainting": (
        {**OUTER, "in_channels": 9},
        {"mask": ("B", 1, "H", "W"), "masked_image_latents": ("B", 4, "H", "W")},
    ),
}


def plan(fields: dict[str, Any], conditions: dict[str, Any]) -> GraphPlan:
    """Of a random UNet's step."""
    unet = make_unet(**fields)
    width = 24 - 8 * ("encoder_hidden_states_2" in conditions)
    module = Denoiser(unet, tuple(conditions))
    told = {"encoder_hidden_states": ("G*B", "L", width)}
    return plan_step("denoiser", module, ("B", 4, "H", "W"), told, conditions, factor=2)


def kandinsky_plan() -> GraphPlan:
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        addition_embed_type_num_heads=64,
        encoder_hid_dim_type="image_proj",
        out_channels=8,
        attention_head_dim=16,
        cross_attention_dim=32,
        encoder_hid_dim=32,
        addition_embed_type="image",
    )
    told = {"image_embeds": ("G*B", 32)}
    return plan_step("denoiser", ImageDenoiser(unet.eval()), ("B", 4, "H", "W"), told, {}, factor=2)


PLANS: dict[str, Callable[[], GraphPlan]] = {
    **{name: lambda case=case: plan(*case) for name, case in UNETS.items()},  # type: ignore[misc]
    "kandinsky": kandinsky_plan,
}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("make", PLANS.values(), ids=PLANS)
@torch.no_grad()
def test_full_then_shallow_is_the_whole_step(
    make: Callable[[], GraphPlan], branches: int, layers: int
) -> None:
    """With the deep features of the same step; with those of another it is another step."""
    whole = make()
    deep, shallow = plan_deep(whole, layers), plan_shallow(whole, layers)
    for each in (whole, deep, shallow):
        assert [spec.name for spec in each.inputs] == list(each.example) == list(each.axes)
    trials = reference(whole, [{"B": 2, "G": branches, "H": 6, "W": 4, "L": 5}] * 2)
    features = []
    for trial in trials:
        inputs = {name: torch.from_numpy(value) for name, value in trial.inputs.items()}
        *made, kept = deep.module(*inputs.values())
        for got, wanted in zip(made, trial.outputs.values(), strict=True):
            torch.testing.assert_close(got, torch.from_numpy(wanted), rtol=1e-5, atol=1e-6)
        spec = shallow.inputs[-1]
        assert (deep.outputs[-1], spec.name) == (spec, FEATURES)
        assert kept.shape == spec.resolve({"B": 2, "G": branches, "H": 6, "W": 4})
        features.append(kept)
        taken = [inputs[each.name] for each in shallow.inputs[:-1]]
        for got, wanted in zip(shallow.module(*taken, kept), trial.outputs.values(), strict=True):
            torch.testing.assert_close(got, torch.from_numpy(wanted), rtol=1e-5, atol=1e-6)
    other, _ = shallow.module(*taken, features[0])
    assert (other - torch.from_numpy(trials[1].outputs["next_sample"])).abs().max() > 1e-3
    # And the model is as it was.
    again, _ = whole.module(*inputs.values())
    torch.testing.assert_close(again, torch.from_numpy(trials[1].outputs["next_sample"]), rtol=0, atol=0)


@torch.no_grad()
def test_only_the_shallow_part_is_computed() -> None:
    whole = plan({**OUTER, "layers_per_block": 2}, {})
    shallow, unet = plan_shallow(whole, 2), whole.module.unet
    assert isinstance(unet, UNet2DConditionModel)
    ran: dict[str, int] = {}
    for name, part in unet.named_modules():
        if not list(part.children()):
            part.register_forward_hook(lambda _, __, made, name=name: ran.__setitem__(name, len(made)))  # type: ignore[misc]
    shallow.module(*shallow.example.values())
    blocks = {".".join(name.split(".")[:4]) for name in ran if "blocks" in name}
    assert blocks == {
        f"{way}_blocks.{block}.{part}.{index}"
        for way, block, index in (("down", 0, 0), ("up", 1, 1), ("up", 1, 2))
        for part in ("resnets", "attentions")
    }
    # What is the same for both branches is computed once.
    assert (ran["down_blocks.0.resnets.0.conv1"], ran["conv_out"]) == (3, 6)


@pytest.mark.parametrize("name", ["inner", "xl", "kandinsky"])
def test_text_that_nothing_attends_to_is_no_input(name: str) -> None:
    whole = PLANS[name]()
    left = {spec.name for spec in whole.inputs} - {spec.name for spec in plan_shallow(whole, 1).inputs}
    assert (
        left
        == {
            "inner": {"encoder_hidden_states"},
            "xl": {"encoder_hidden_states", "encoder_hidden_states_2"},
            "kandinsky": set(),
        }[name]
    )


def config(**fields: Any) -> dict[str, Any]:
    return {**make_unet().config, "_class_name": "UNet2DConditionModel", **fields}


@pytest.mark.parametrize(
    ("fields", "layers", "message"),
    [
        ({}, 3, "cannot have 3 shallow layers: .* has 2, so choose from 1 .* to 2"),
        ({}, -1, "cannot have -1 shallow"),
        ({"layers_per_block": [3, 1]}, 5, "has 4, so"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, 1, "last up block, a AttnUpBlock2D: known are"),
        ({"down_block_types": ["KDownBlock2D", PLAIN]}, 1, "first down block, a KDownBlock2D"),
        ({"_class_name": "Kandinsky3UNet"}, 1, "needs a UNet2DConditionModel, the checkpoint has a Kand"),
    ],
)
def test_what_cannot_be_cut(fields: dict[str, Any], layers: int, message: str) -> None:
    check_cut(config(), 2)
    with pytest.raises(ExportError, match=message):
        check_cut(config(**fields), layers)


def test_kandinsky_3_is_refused(tmp_path: Path) -> None:
    checkpoint = write_tiny_kandinsky3(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match="the checkpoint has a Kandinsky3UNet"):
        export_checkpoint(str(checkpoint), tmp_path / "bundle", step_cache=1)
    assert not (tmp_path / "bundle").exists()


def run(bundle: Bundle, role: str, inputs: Arrays) -> Arrays:
    """What ONNX Runtime makes of a component's graph."""
    component = bundle.component(role)
    session = open_session(bundle.path(component.graph), component, "ort", threads=1)
    lanes, _, height, width = inputs["sample"].shape
    extents = {"B": lanes, "G": len(inputs["guidance"]), "H": height, "W": width, "L": 77}
    made, given = (
        session.memory.allocate({spec.name: (spec.resolve(extents), spec.dtype) for spec in specs})
        for specs in (component.outputs, component.inputs)
    )
    for name, tensor in given.tensors.items():
        tensor.array[...] = inputs[name]
    session.bind({**given.tensors, **made.tensors}).run()
    session.close()
    return {name: tensor.array for name, tensor in made.tensors.items()}


@pytest.mark.parametrize(
    ("fixture", "limit"), [("cached_bundle", 1e-5), ("xl_cached_bundle", 5e-3)], ids=["fp32", "fp16"]
)
def test_graphs_full_then_shallow_are_the_whole_step(
    request: pytest.FixtureRequest, fixture: str, limit: float
) -> None:
    bundle: Bundle = request.getfixturevalue(fixture)
    random = np.random.default_rng(5)
    extents = {"B": 3, "G": 2, "H": 6, "W": 4, "L": 77}
    inputs = {
        spec.name: random.standard_normal(spec.resolve(extents)).astype(np.float32)
        for spec in bundle.component("denoiser").inputs
    }
    inputs |= {"timestep": np.array([900, 51.5, 0], np.float32), "bounds": np.full(3, 3e38, np.float32)}
    whole = run(bundle, "denoiser", inputs)
    deep = run(bundle, DEEP, inputs)
    shallow = run(bundle, SHALLOW, {**inputs, FEATURES: deep.pop(FEATURES)})
    for made in (deep, shallow):
        assert made.keys() == whole.keys()
        for name, wanted in whole.items():
            np.testing.assert_allclose(made[name], wanted, rtol=0, atol=limit * float(wanted.std()))


@pytest.mark.parametrize("fixture", ["cached_bundle", "xl_cached_bundle"])
def test_weights_are_stored_once(request: pytest.FixtureRequest, fixture: str) -> None:
    bundle: Bundle = request.getfixturevalue(fixture)
    files = [path for path in bundle.manifest.files if path.startswith("denoiser")]
    graphs = ["deep.onnx", "model.onnx", "shallow.onnx"]
    graphs += ["deep-float32.onnx", "float32.onnx", "shallow-float32.onnx"]
    assert sorted(files) == sorted(f"denoiser/{name}" for name in (*graphs, "weights.safetensors"))
    places: dict[str, dict[str, tuple[str, ...]]] = {}
    for role in ("denoiser", DEEP, SHALLOW):
        graph = onnx.load(bundle.path(bundle.component(role).graph), load_external_data=False).graph
        places[role] = {
            each.name: tuple(entry.value for entry in each.external_data)
            for each in graph.initializer
            if each.external_data
        }
    assert places[DEEP] == places["denoiser"]
    assert places[SHALLOW].items() < places["denoiser"].items()
    used = {role: sum(int(place[2]) for place in found.values()) for role, found in places.items()}
    stated = {role: bundle.component(role).weight_bytes for role in used}
    assert stated == {**used, "denoiser": None}
    assert used[SHALLOW] < used[DEEP] / 3
    assert open_bundle(bundle.folder, verify=True).manifest == bundle.manifest


SETTINGS: dict[str, Any] = {"num_inference_steps": 7, "width": 96, "height": 64}
PROMPT = {"prompt": "a red circle", "negative_prompt": "dark"}


@pytest.fixture(scope="module", params=["ort", "openvino"])
def pipeline(request: pytest.FixtureRequest, cached_bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.open(cached_bundle.folder, backend=request.param, precision="fp32", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def diffusers_pipeline(cached_checkpoint: Path) -> Any:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(cached_checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Cached:
    """The UNet of a pipeline, computed in full at every so many calls, with diffusers' modules."""

    def __init__(self, unet: Any, interval: int) -> None:
        self.unet, self.whole, self.interval = unet, unet.forward, interval
        self.calls = 0
        self.features = torch.zeros(0)

    def __call__(
        self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: Any, **options: Any
    ) -> Any:
        full = self.calls % self.interval == 0
        self.calls += 1
        if not full:
            return (self.shallow(sample, timestep, encoder_hidden_states),)
        hook = self.unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(self.keep)
        made = self.whole(sample, timestep, encoder_hidden_states=encoder_hidden_states, **options)
        hook.remove()
        return made

    def keep(self, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        """The layer is given deep features and, after them, its skip connection."""
        self.features = inputs[0][:, :32]

    def shallow(self, sample: torch.Tensor, timestep: Any, states: torch.Tensor) -> torch.Tensor:
        unet = self.unet
        embedded = unet.time_embedding(unet.time_proj(timestep.expand(len(sample))))
        joined = torch.cat([self.features, unet.conv_in(sample)], dim=1)
        hidden = unet.up_blocks[-1].resnets[-1](joined, embedded)
        hidden = unet.up_blocks[-1].attentions[-1](hidden, encoder_hidden_states=states)[0]
        made: torch.Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
        return made


@pytest.mark.parametrize(
    ("sampler", "interval", "guidance"),
    [("pndm", 3, 4.0), ("euler", 2, 4.0), ("heun", 2, 4.0), ("ddpm", 5, 4.0), ("ddim", 3, 1.0)],
)
def test_pictures_against_diffusers(
    pipeline: Pipeline,
    diffusers_pipeline: Any,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    interval: int,
    guidance: float,
) -> None:
    """Two pictures, the whole loop."""
    unet, options = diffusers_pipeline.unet, {"guidance_scale": guidance, **SETTINGS}
    diffusers_pipeline.scheduler = getattr(diffusers, find(sampler).scheduler).from_config(
        diffusers_pipeline.scheduler.config, clip_sample=False
    )
    painted: dict[bool, NDArray[np.uint8]] = {}
    for cached in (False, True):
        if cached:
            monkeypatch.setattr(unet, "forward", Cached(unet, interval))
        generator = [torch.Generator("cpu").manual_seed(seed) for seed in (11, 12)]
        made = diffusers_pipeline(
            **PROMPT, generator=generator, num_images_per_prompt=2, output_type="np", **options
        )
        painted[cached] = (made.images * 255).round().astype(np.uint8)
    result = pipeline.generate(
        **PROMPT, sampler=sampler, seed=11, num_images=2, cache_interval=interval, **options
    )
    for index, image in enumerate(result.images):
        assert psnr(painted[True][index], np.asarray(image)) >= max(
            50, psnr(painted[True][index], painted[False][index]) + 10
        )
    assert [each.cache_interval for each in result.parameters] == [interval] * 2


def paint(pipeline: Pipeline, **options: Any) -> list[bytes]:
    settings = {**PROMPT, **SETTINGS, "seed": 3, **options}
    return [image.tobytes() for image in pipeline.generate(**settings).images]


def test_an_interval_of_one_is_none(pipeline: Pipeline) -> None:
    """Bit for bit, also after a cached picture, whose graphs are others."""
    plain = paint(pipeline)
    cached = paint(pipeline, cache_interval=2)
    assert cached != plain
    assert paint(pipeline, cache_interval=1) == plain
    assert paint(pipeline, cache_interval=2) == cached


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_full_steps_alone_are_the_picture(cached_bundle: Bundle, backend: str) -> None:
    """One step is a full one: what the other graph makes of it is what the denoiser makes."""
    once = {**SETTINGS, "num_inference_steps": 1, "seed": 3}
    with Pipeline.open(cached_bundle.folder, backend=backend, precision="fp32", threads=1) as pipeline:
        pictures = [
            np.asarray(pipeline.generate(**PROMPT, **once, cache_interval=interval).images[0])
            for interval in (1, 4)
        ]
    assert psnr(*pictures) >= 60


def test_neighbours_do_not_matter(cached_bundle: Bundle) -> None:
    with Pipeline.open(cached_bundle.folder, backend="ort", threads=1) as pipeline:
        both = paint(pipeline, cache_interval=3, num_images=2)
        alone = [paint(pipeline, cache_interval=3, seed=seed)[0] for seed in (3, 4)]
    assert both == alone


def test_graphs_are_opened_when_they_are_needed(cached_bundle: Bundle) -> None:
    opened: list[str] = []

    def watch(role: str, session: Session) -> Session:
        opened.append(role)
        return session

    with Pipeline.open(cached_bundle.folder, backend="ort", threads=1, watch=watch) as pipeline:
        paint(pipeline)
        assert set(opened) == {"text_encoder", "denoiser", "vae_decoder"}
        paint(pipeline, cache_interval=2)
        paint(pipeline, cache_interval=3)
    assert opened[3:] == [DEEP, SHALLOW]


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_within_a_memory_limit(cached_bundle: Bundle, backend: str) -> None:
    """Of the whole denoiser and the one that hands out features only one is there."""
    opens: dict[str, Any] = {"backend": backend, "precision": "fp32", "threads": 1, "embedding_cache": 0}
    request: dict[str, Any] = {**PROMPT, **SETTINGS, "seed": 3, "output_type": "latent"}
    with Pipeline.open(cached_bundle.folder, memory_limit="1TB", **opens) as pipeline:
        plain, roomy = (pipeline.generate(**request, cache_interval=each) for each in (1, 2))
    assert roomy.memory is not None
    limit = roomy.memory.components[DEEP] + roomy.memory.components[SHALLOW]
    with Pipeline.open(cached_bundle.folder, memory_limit=limit, **opens) as pipeline:
        first, result, last = (pipeline.generate(**request, cache_interval=each) for each in (1, 2, 1))
    for made, wanted in ((first, plain), (result, roomy), (last, plain)):
        assert made.latents is not None
        assert wanted.latents is not None
        np.testing.assert_array_equal(made.latents, wanted.latents)
    assert result.memory is not None
    assert "denoiser" in result.memory.unloaded
    assert result.memory.loaded.count(DEEP) == result.memory.loaded.count(SHALLOW) == 1
    assert result.memory.peak <= limit


def test_what_memory_is_reckoned(cached_bundle: Bundle) -> None:
    """Of a file of weights that others use too, the part that is used."""
    weights = (cached_bundle.folder / "denoiser" / "weights.safetensors").stat().st_size
    shallow, deep = (weigh_files(cached_bundle, role).weights for role in (SHALLOW, DEEP))
    assert shallow < weights / 3 < weights < deep < 2 * weights


def test_a_limit_too_small_is_told_before_painting(cached_bundle: Bundle) -> None:
    with Pipeline.open(cached_bundle.folder, backend="ort", threads=1, memory_limit="1TB") as pipeline:
        roomy = pipeline.generate(**PROMPT, **SETTINGS, seed=3, cache_interval=2)
    assert roomy.memory is not None
    limit = roomy.memory.components[SHALLOW] - 1
    seen: list[Any] = []
    with (
        Pipeline.open(cached_bundle.folder, backend="ort", threads=1, memory_limit=limit) as pipeline,
        pytest.raises(BackendError, match="the denoiser_deep needs about"),
    ):
        pipeline.generate(
            **PROMPT, **SETTINGS, seed=3, cache_interval=2, callback=seen.append, preview_every=None
        )
    assert seen == []


def test_within_a_mask(pipeline: Pipeline) -> None:
    """What is kept is put back after steps of either kind."""
    grey, mask = Image.new("RGB", (96, 64), "#808080"), Image.new("L", (96, 64), 0)
    mask.paste(255, (48, 0, 96, 64))
    options: dict[str, Any] = {"image": grey, "mask": mask, "strength": 0.8, "cache_interval": 3}
    picture = np.asarray(pipeline.generate(**PROMPT, **SETTINGS, seed=3, **options).images[0]).astype(int)
    whole = pipeline.generate(**PROMPT, **SETTINGS, seed=3, **{**options, "cache_interval": 1}).images[0]
    apart = np.abs(picture - np.asarray(whole))
    assert apart[:, :32].mean() < apart[:, 64:].mean() / 2


def test_xl(xl_cached_bundle: Bundle) -> None:
    """Its shallow part is told sizes and the pooled text, and no other text."""
    pictures = []
    for backend, precision in (("ort", "fp16"), ("openvino", "fp32")):
        with Pipeline.open(
            xl_cached_bundle.folder, backend=backend, precision=precision, threads=1
        ) as pipeline:
            pictures += [
                np.asarray(pipeline.generate(**PROMPT, **SETTINGS, seed=3, cache_interval=each).images[0])
                for each in (1, 3)
            ]
    assert not any("encoder" in spec.name for spec in xl_cached_bundle.component(SHALLOW).inputs)
    assert psnr(pictures[1], pictures[3]) >= max(35, psnr(pictures[1], pictures[0]) + 5)


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        (0, "cache_interval is 0: it should be at least 1"),
        (2.0, "cache_interval is 2.0: it should be a whole number"),
        (True, "cache_interval is True"),
    ],
)
def test_intervals_that_are_none(pipeline: Pipeline, interval: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        paint(pipeline, cache_interval=interval)


def test_a_bundle_without_the_graphs(tiny_bundle: Bundle) -> None:
    with (
        Pipeline.open(tiny_bundle.folder, backend="ort", threads=1) as pipeline,
        pytest.raises(RequestError, match=r"cache_interval is 2, but .* export .* again with --step-cache"),
    ):
        paint(pipeline, cache_interval=2)


def test_openvino_builds_them(cached_bundle: Bundle, cache: Path) -> None:
    with Pipeline.open(cached_bundle.folder, backend="openvino", precision="fp32", threads=1) as pipeline:
        wanted = paint(pipeline, cache_interval=2)
    built = build_bundle(cached_bundle, backend="openvino", precision="fp32", components=[DEEP, SHALLOW])
    assert [each.component for each in built] == [DEEP, SHALLOW]
    assert all(each.engine.error is not None and each.engine.error < 1e-4 for each in built)
    with Pipeline.open(cached_bundle.folder, backend="openvino", precision="fp32", threads=1) as pipeline:
        assert paint(pipeline, cache_interval=2) == wanted


@pytest.mark.parametrize("fixture", ["cached_bundle", "xl_cached_bundle"])
def test_tensorrt_rtx_compiles_them(request: pytest.FixtureRequest, fixture: str, cache: Path) -> None:
    try:
        choose_flavour("tensorrt-rtx")
    except BackendError as error:
        pytest.skip(str(error))
    bundle: Bundle = request.getfixturevalue(fixture)
    options = Options(targets=("8.9",))
    built = build_bundle(
        bundle, backend="tensorrt-rtx", batch=(1, 2), options=options, components=[DEEP, SHALLOW]
    )
    for each in built:
        assert each.engine.key.component == each.component
        assert [profile.extents["G"] for profile in each.engine.key.profiles] == [(1, 2, 2)] * 2
    sizes = {each.component: (each.folder / each.engine.main).stat().st_size for each in built}
    assert sizes[SHALLOW] < sizes[DEEP]
