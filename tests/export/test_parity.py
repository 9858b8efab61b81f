"""The same seed gives the picture of diffusers' StableDiffusionPipeline."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from allaprima.bundle import Bundle
from allaprima.runtime import Pipeline
from allaprima.runtime.samplers import find

from .conftest import SHAPES

SAMPLERS = ("ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "pndm")
# With few cases each: what they have in common with those above is tested there.
MORE = (
    *(
        "lms",
        "heun",
        "dpm2_karras",
        "dpm2_a",
        "dpmpp_2m_exponential",
        "dpmpp_3m_sde_karras",
        "dpmpp_2s_karras",
    ),
    *("deis", "unipc", "unipc_karras", "lcm", "tcd"),
)
PROMPT = "a small red circle above a blue square on a white background"
Pictures = NDArray[np.uint8]
Reference = Callable[..., Pictures]


def psnr(a: Pictures, b: Pictures) -> float:
    error = np.square(a.astype(np.float64) - b).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


def reference_of(folder: Path, kind: str = "StableDiffusionPipeline") -> Reference:
    parts = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).components
    pipeline = getattr(diffusers, kind)(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    own = {**pipeline.scheduler.config, "clip_sample": False}  # as the pipeline corrects its own

    def paint(sampler: str, *, seed: int, images: int, **settings: object) -> Pictures:
        info = find(sampler)
        pipeline.scheduler = getattr(diffusers, info.scheduler).from_config(own, **info.overrides)
        generators = [torch.Generator("cpu").manual_seed(seed + k) for k in range(images)]
        made = pipeline(
            PROMPT, num_images_per_prompt=images, generator=generators, output_type="np", **settings
        )
        return (made.images * 255).round().astype(np.uint8)

    return paint


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path, tiny_bundle: Bundle) -> Iterator[tuple[Reference, Pipeline]]:
    with Pipeline.open(tiny_bundle.folder, backend="ort", threads=1) as pipeline:
        yield reference_of(tiny_checkpoint), pipeline


@pytest.fixture(scope="module")
def shapes(shapes_bundle: Bundle) -> Iterator[tuple[Reference, Pipeline]]:
    with Pipeline.open(shapes_bundle.folder, backend="ort", threads=1) as pipeline:
        yield reference_of(SHAPES), pipeline


def compare(
    pair: tuple[Reference, Pipeline], sampler: str, *, num_images: int = 1, **settings: object
) -> float:
    reference, pipeline = pair
    wanted = reference(sampler, seed=11, images=num_images, **settings)
    result = pipeline.generate(PROMPT, sampler=sampler, seed=11, num_images=num_images, **settings)  # type: ignore[arg-type]
    return min(psnr(want, np.asarray(got)) for want, got in zip(wanted, result.images, strict=True))


@pytest.mark.parametrize("negative", ["", "a green star"])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64)])
@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_tiny_model(
    tiny: tuple[Reference, Pipeline], sampler: str, steps: int, width: int, height: int, negative: str
) -> None:
    for images in (1, 3):
        found = compare(
            tiny,
            sampler,
            num_images=images,
            num_inference_steps=steps,
            guidance_scale=5.0,
            width=width,
            height=height,
            negative_prompt=negative,
        )
        assert found >= 50, f"{images} images: {found:.1f} dB"


@pytest.mark.parametrize("sampler", MORE)
def test_more_samplers(tiny: tuple[Reference, Pipeline], sampler: str) -> None:
    found = compare(
        tiny,
        sampler,
        num_images=2,
        num_inference_steps=5,
        guidance_scale=5.0,
        width=96,
        height=64,
        negative_prompt="a green star",
    )
    assert found >= 50, f"{found:.1f} dB"


@pytest.fixture(scope="module")
def repainting(tiny_checkpoint: Path, tiny: tuple[Reference, Pipeline]) -> tuple[Reference, Pipeline]:
    return reference_of(tiny_checkpoint, "StableDiffusionImg2ImgPipeline"), tiny[1]


def picture(width: int, height: int) -> Image.Image:
    rough = np.random.default_rng(4).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("strength", [0.3, 0.75])
@pytest.mark.parametrize(
    # diffusers gives lms the weights of a full history that is not there; dpmpp_2s goes in pairs of steps.
    "sampler",
    [name for name in (*SAMPLERS, *MORE) if name not in ("lms", "dpmpp_2s_karras")],
)
def test_image_to_image(repainting: tuple[Reference, Pipeline], sampler: str, strength: float) -> None:
    for steps in (4, 9):
        found = compare(
            repainting,
            sampler,
            num_images=2,
            image=picture(96, 64),
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=5.0,
            negative_prompt="a green star",
        )
        assert found >= 50, f"{steps} steps: {found:.1f} dB"


@pytest.fixture(scope="module")
def inpainting(tiny_checkpoint: Path, tiny: tuple[Reference, Pipeline]) -> tuple[Reference, Pipeline]:
    reference = reference_of(tiny_checkpoint, "StableDiffusionInpaintPipeline")

    def paint(sampler: str, *, mask: Image.Image, **settings: Any) -> Pictures:
        return reference(sampler, mask_image=mask, width=96, height=64, **settings)

    return paint, tiny[1]


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "pndm", "heun", "unipc"])
def test_inpainting(inpainting: tuple[Reference, Pipeline], sampler: str, strength: float) -> None:
    mask = Image.new("L", (96, 64))
    mask.paste(255, (30, 10, 75, 50))
    found = compare(
        inpainting,
        sampler,
        image=picture(96, 64),
        mask=mask,
        strength=strength,
        num_inference_steps=6,
        guidance_scale=5.0,
    )
    assert found >= 50, f"{found:.1f} dB"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_guidance(tiny: tuple[Reference, Pipeline], sampler: str) -> None:
    assert compare(tiny, sampler, num_inference_steps=5, guidance_scale=1.0, width=64, height=64) >= 50


@pytest.mark.parametrize(
    ("steps", "width", "height", "negative", "images"),
    [
        (5, 128, 128, "", 1),
        (20, 128, 128, "", 1),
        (5, 192, 128, "a green star", 3),
        (20, 128, 192, "a green star", 1),
    ],
)
# Not pndm: the configuration does not skip its Runge-Kutta phase, and the runtime refuses what it lacks.
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "pndm"])
def test_shapes(
    shapes: tuple[Reference, Pipeline],
    sampler: str,
    steps: int,
    width: int,
    height: int,
    negative: str,
    images: int,
) -> None:
    found = compare(
        shapes,
        sampler,
        num_images=images,
        num_inference_steps=steps,
        guidance_scale=5.0,
        width=width,
        height=height,
        negative_prompt=negative,
    )
    assert found >= 50, f"{found:.1f} dB"


def test_openvino_in_fp32(tiny_checkpoint: Path, tiny_bundle: Bundle) -> None:
    with Pipeline.open(tiny_bundle.folder, backend="openvino", precision="fp32", threads=1) as pipeline:
        pair = reference_of(tiny_checkpoint), pipeline
        assert (
            compare(pair, "dpmpp_2m", num_inference_steps=10, guidance_scale=5.0, width=96, height=64) >= 50
        )
