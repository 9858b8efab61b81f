"""Kandinsky 2.2: the same seed gives the embeddings and pictures of diffusers' pipelines."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from allaprima.bundle import Bundle, BundleError, ExportError, RequestError
from allaprima.cli.main import main
from allaprima.export import export_checkpoint
from allaprima.runtime import Pipeline
from allaprima.runtime.kandinsky import Kandinsky
from allaprima.runtime.noise import Noise

from .conftest import write_tiny_kandinsky, write_tiny_prior
from .test_parity import Pictures, picture, psnr

PROMPT = "a small red circle above a blue square on a white background"
NEGATIVE = "a green star"
SEED = 11
STEPS: dict[str, Any] = {"num_inference_steps": 5, "prior_num_inference_steps": 4}
Reference = Callable[..., Pictures]
Pair = tuple[dict[str, Any], Pipeline]


@pytest.fixture(scope="module")
def pair(
    kandinsky_checkpoint: Path, prior_checkpoint: Path, kandinsky_bundle: Bundle
) -> Iterator[Pair]:
    """The parts of diffusers' pipelines, as the combined ones name them, and the runtime."""
    yield_parts = parts_of(kandinsky_checkpoint, prior_checkpoint)
    with Pipeline.open(kandinsky_bundle.folder, backend="ort", threads=1) as pipeline:
        yield yield_parts, pipeline


@pytest.fixture(scope="module")
def inpainting(
    prior_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """A decoder that was trained to inpaint."""
    folder = tmp_path_factory.mktemp("kandinsky")
    decoder = write_tiny_kandinsky(folder / "decoder", kind="KandinskyV22InpaintPipeline", in_channels=9)
    bundle = export_checkpoint(
        str(decoder), folder / "bundle", prior=str(prior_checkpoint), precision="fp32"
    )
    with Pipeline.open(bundle.folder, backend="ort", threads=1) as pipeline:
        yield parts_of(decoder, prior_checkpoint), pipeline


def parts_of(decoder: Path, prior: Path) -> dict[str, Any]:
    load = diffusers.DiffusionPipeline.from_pretrained
    parts = load(prior, dtype=torch.float32).components
    return {
        **load(decoder, dtype=torch.float32).components,
        **{f"prior_{name}": part for name, part in parts.items()},
    }


def reference(parts: dict[str, Any], task: str = "", *, images: int = 1, **settings: Any) -> Pictures:
    """What diffusers paints of one seed after the other, each alone."""
    pipeline = getattr(diffusers, f"KandinskyV22{task}CombinedPipeline")(**parts)
    pipeline.set_progress_bar_config(disable=True)
    made = [
        pipeline(
            **{"prompt": PROMPT, **settings},
            generator=torch.Generator("cpu").manual_seed(SEED + index),
            output_type="np",
        ).images
        for index in range(images)
    ]
    return (np.concatenate(made) * 255).round().astype(np.uint8)


def pixels(pipeline: Pipeline, **options: Any) -> Pictures:
    images = pipeline.generate(**{"prompt": PROMPT, "seed": SEED, **options}).images
    return np.stack([np.asarray(image) for image in images])


def worst(wanted: Pictures, got: Pictures) -> float:
    return min(psnr(want, each) for want, each in zip(wanted, got, strict=True))


@pytest.mark.parametrize("negative", [None, "", NEGATIVE])
@pytest.mark.parametrize("scale", [4.0, 1.0])
@pytest.mark.parametrize("steps", [2, 25])
def test_embeddings(pair: Pair, negative: str | None, scale: float, steps: int) -> None:
    parts, pipeline = pair
    prior = diffusers.KandinskyV22PriorPipeline(
        **{name.removeprefix("prior_"): part for name, part in parts.items() if name.startswith("prior_")}
    )
    prior.set_progress_bar_config(disable=True)
    family = pipeline._family
    assert isinstance(family, Kandinsky)
    settings = family.settle(
        pipeline_settings(
            pipeline, negative_prompt=negative, prior_guidance_scale=scale, prior_num_inference_steps=steps
        )
    )
    told = family.plan(settings)
    assert told.warnings == ()
    told.draw([Noise(SEED), Noise(SEED + 1)])
    for index in range(2):
        made = prior(
            PROMPT,
            negative_prompt=negative,
            guidance_scale=scale,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(SEED + index),
        )
        wanted = np.stack([made.negative_image_embeds.numpy()[0], made.image_embeds.numpy()[0]])
        assert np.abs(told.embeds[:, index] - wanted).max() <= 1e-4 * np.abs(wanted).max()


def pipeline_settings(pipeline: Pipeline, **options: Any) -> Any:
    from allaprima.runtime import Request

    return Request(PROMPT, **options).check(pipeline.bundle.manifest)


@pytest.mark.parametrize("negative", [None, "", NEGATIVE])
@pytest.mark.parametrize(
    "settings",
    [
        {"height": 64, "width": 64},
        {"height": 48, "width": 96},
        {"height": 48, "width": 32, "guidance_scale": 1.0},
        {"height": 32, "width": 64, "prior_guidance_scale": 1.0},
        {"height": 32, "width": 32, "guidance_scale": 9.5, "prior_guidance_scale": 2.0},
    ],
)
def test_text_to_image(pair: Pair, settings: dict[str, Any], negative: str | None) -> None:
    settings = {**STEPS, "negative_prompt": negative, **settings}
    wanted = reference(pair[0], images=2, **settings)
    assert wanted.std() > 5
    assert psnr(wanted[0], wanted[1]) < 40, "seeds should matter"
    assert worst(wanted, pixels(pair[1], num_images=2, **settings)) >= 45


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("size", [(64, 64), (70, 50), (33, 96)])
@pytest.mark.parametrize("strength", [None, 0.7, 1.0])
def test_image_to_image(
    pair: Pair, size: tuple[int, int], strength: float | None, negative: str | None
) -> None:
    """diffusers hands width and height to its resizing in the wrong order, so here it is told them swapped."""
    given = {} if strength is None else {"strength": strength}
    settings = {**STEPS, "negative_prompt": negative, "image": picture(*size), **given}
    wanted = reference(pair[0], "Img2Img", images=2, **settings, height=64, width=48)
    assert wanted.shape == (2, 48, 64, 3)
    got = pixels(pair[1], num_images=2, **settings, height=48, width=64)
    assert worst(wanted, got) >= 45


@pytest.mark.parametrize(("negative", "scale"), [(None, 4.0), (NEGATIVE, 4.0), (None, 1.0)])
@pytest.mark.parametrize("size", [(64, 48), (97, 61)])
def test_inpainting(inpainting: Pair, size: tuple[int, int], scale: float, negative: str | None) -> None:
    settings = {**STEPS, "negative_prompt": negative, "guidance_scale": scale, "image": picture(*size)}
    settings |= {"height": 48, "width": 64}
    mask = Image.fromarray((np.indices(size[::-1]).sum(0) % 40 < 17).astype(np.uint8) * 255)
    wanted = reference(inpainting[0], "Inpaint", images=2, mask_image=mask, **settings)
    assert worst(wanted, pixels(inpainting[1], num_images=2, mask=mask, **settings)) >= 45


def test_a_decoder_of_pictures_keeps_what_a_mask_keeps(pair: Pair) -> None:
    """One that was not trained to inpaint has the rest put back after every step."""
    image, mask = picture(64, 64), np.zeros((64, 64, 3), np.uint8)
    mask[:, :32] = 255
    whole = pixels(pair[1], image=image, strength=0.3, **STEPS)
    found = pixels(pair[1], image=image, mask=mask, **STEPS)
    kept = pixels(pair[1], image=image, mask=np.zeros_like(mask), **STEPS)
    assert psnr(found[:, :, 52:], kept[:, :, 52:]) > psnr(found[:, :, :16], kept[:, :, :16]) + 3
    assert psnr(whole, kept) < 45
