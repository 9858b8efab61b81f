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
from numpy.typing import NDArray

from allaprima.bundle import Bundle, BundleError, ExportError, RequestError
from allaprima.cli.main import main
from allaprima.export import export_checkpoint
from allaprima.runtime import Pipeline
from allaprima.runtime.kandinsky import Kandinsky
from allaprima.runtime.noise import Noise

from .conftest import write_tiny_kandinsky, write_tiny_prior
from .test_parity import Pictures, psnr

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
