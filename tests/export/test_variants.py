"""Models with further inputs, inpainting and embedded guidance, and the presets of distilled ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from allaprima.bundle import ExportError, RequestError
from allaprima.export import PRESETS, Usage
from allaprima.export.source import open_checkpoint
from allaprima.export.stable_diffusion import read_family
from allaprima.runtime import Pipeline
from allaprima.runtime.conditioning import embed_scale
from allaprima.runtime.samplers import find, make_table

from .conftest import Export, write_tiny
from .test_parity import Pictures, picture, psnr

PROMPT = "a small red circle above a blue square"
MASK = Image.new("L", (96, 64))
MASK.paste(255, (30, 10, 75, 50))


def paint(pipeline: Any, *, seed: int = 11, **settings: Any) -> Pictures:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    made = pipeline(PROMPT, generator=generator, output_type="np", **settings).images
    return (made * 255).round().astype(np.uint8)


def pixels(pipeline: Pipeline, **options: Any) -> Pictures:
    return np.stack([np.asarray(image) for image in pipeline.generate(PROMPT, **options).images])


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory, export: Export) -> Iterator[tuple[Any, Pipeline]]:
    folder = tmp_path_factory.mktemp("inpainting")
    write_tiny(folder, kind="StableDiffusionInpaintPipeline", in_channels=9)
    bundle = export(folder, "inpainting", "fp32")
    parts = diffusers.StableDiffusionPipeline.from_pretrained(folder).components
    reference = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    with Pipeline.open(bundle.folder, backend="ort", threads=1) as pipeline:
        yield reference, pipeline


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m"])
def test_inpainting_with_nine_channels(
    inpainting: tuple[Any, Pipeline], sampler: str, strength: float
) -> None:
    reference, pipeline = inpainting
    info = find(sampler)
    reference.scheduler = getattr(diffusers, info.scheduler).from_config(
        {**reference.scheduler.config, "clip_sample": False}, **info.overrides
    )
    settings: dict[str, Any] = {
        "image": picture(96, 64),
        "strength": strength,
        "num_inference_steps": 6,
        "guidance_scale": 4.0,
        "negative_prompt": "a green star",
    }
    wanted = paint(reference, mask_image=MASK, width=96, height=64, **settings)
    assert psnr(wanted, pixels(pipeline, mask=MASK, sampler=sampler, seed=11, **settings)) >= 50


def test_a_picture_of_a_batch_is_the_picture_alone(inpainting: tuple[Any, Pipeline]) -> None:
    settings: dict[str, Any] = {"image": picture(96, 64), "mask": MASK, "num_inference_steps": 2}
    both = pixels(inpainting[1], seed=3, num_images=2, **settings)
    assert psnr(both[1:], pixels(inpainting[1], seed=4, **settings)) > 60


@pytest.mark.parametrize("options", [{}, {"image": picture(64, 64)}])
def test_a_model_of_inpainting_needs_a_mask(
    inpainting: tuple[Any, Pipeline], options: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match="this model paints within a mask: hand in an image and a mask"):
        inpainting[1].generate(PROMPT, **options)


@pytest.fixture(scope="module")
def consistency(tmp_path_factory: pytest.TempPathFactory, export: Export) -> Iterator[tuple[Any, Pipeline]]:
    folder = tmp_path_factory.mktemp("consistency")
    write_tiny(folder, kind="LatentConsistencyModelPipeline", time_cond_proj_dim=10)
    bundle = export(folder, "consistency", "fp32", usage=Usage("lcm"))
    parts = diffusers.DiffusionPipeline.from_pretrained(folder).components
    parts["scheduler"] = diffusers.LCMScheduler.from_config(parts["scheduler"].config)
    reference = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    with Pipeline.open(bundle.folder, backend="ort", threads=1) as pipeline:
        yield reference, pipeline


@pytest.mark.parametrize("guidance", [1.0, 8.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_embedded_guidance(consistency: tuple[Any, Pipeline], steps: int, guidance: float) -> None:
    reference, pipeline = consistency
    settings: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "height": 64,
        "width": 96,
    }
    assert psnr(paint(reference, **settings), pixels(pipeline, seed=11, **settings)) >= 50


def test_embedded_guidance_needs_no_second_branch(consistency: tuple[Any, Pipeline]) -> None:
    _, pipeline = consistency
    assert pipeline.bundle.manifest.defaults.guidance_scale == 8.0
    result = pipeline.generate(PROMPT, negative_prompt="blue", seed=1)
    assert result.parameters[0].sampler == "lcm"
    assert result.warnings == (
        "the negative prompt has no effect with this model, which has its guidance built in",
    )


@pytest.mark.parametrize("width", [2 * 128, 11])
@pytest.mark.parametrize("scale", [0.0, 7.5])
def test_the_embedding_of_a_scale(width: int, scale: float) -> None:
    wanted = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale]), embedding_dim=width
    )
    np.testing.assert_allclose(embed_scale(scale, width), wanted[0].numpy(), atol=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(tiny_checkpoint: Path, preset: str) -> None:
    """Each is a configuration that its sampler takes, with what it says."""
    family = Usage(preset).apply(read_family(open_checkpoint(str(tiny_checkpoint))))
    defaults = family.defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (
        PRESETS[preset].steps,
        PRESETS[preset].guidance_scale,
    )
    table = make_table(family.scheduler, None, defaults.num_inference_steps, history=4)
    assert find(table.sampler).scheduler == PRESETS[preset].scheduler["_class_name"]
    if PRESETS[preset].scheduler.get("timestep_spacing") == "trailing":
        assert table.timesteps[0] == 999


def test_usage_over_a_preset(tiny_checkpoint: Path) -> None:
    family = Usage("lightning", 8, 1.5).apply(read_family(open_checkpoint(str(tiny_checkpoint))))
    assert (family.defaults.num_inference_steps, family.defaults.guidance_scale) == (8, 1.5)


def test_usage_that_is_refused() -> None:
    with pytest.raises(ExportError, match="no preset 'fast': choose turbo, lightning, lcm, tcd"):
        Usage("fast")
    with pytest.raises(ExportError, match="steps is 0: it should be at least 1"):
        Usage(steps=0)
