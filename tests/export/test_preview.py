"""The map that export fits, and what previews made with it show."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image

from allaprima.bundle import Bundle, Latent
from allaprima.export.encoders import ImageDecoder
from allaprima.export.preview import Floats, fit_preview
from allaprima.runtime import Pipeline, Progress, open_session

PROMPT = "a large red circle above a blue square on a yellow background"
LATENT = Latent(channels=5, downscale=8, multiple=64)
MIX = np.random.default_rng(5).normal(size=(3, 5))
# Each keeps something else: a clean sample, the noise, a slope, the model's output, two calls a step.
SAMPLERS: Mapping[str, Mapping[str, Any]] = {
    **{
        name: {}
        for name in (
            *("ddim", "ddpm", "euler_karras", "euler_a", "heun", "dpm2_karras", "dpm2_a_karras"),
            *("dpmpp_2m", "dpmpp_3m_sde", "dpmpp_2s", "deis", "unipc", "lms", "lcm", "tcd"),
        )
    },
    "pndm": {"skip_prk_steps": True},
    "dpmpp_2m_karras": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
}


def encode(images: Sequence[Floats]) -> list[NDArray[np.float64]]:
    """An autoencoder that mixes the mean colours of its blocks, plus a constant."""
    blocks = [image.reshape(1, 3, 16, 8, 16, 8).mean((3, 5)) for image in images]
    return [np.einsum("bdhw,dc->bchw", each / 2 + 0.5, MIX) + 0.7 for each in blocks]


def test_a_linear_autoencoder_is_inverted() -> None:
    preview = fit_preview(encode, LATENT)
    assert preview is not None
    colours = np.random.default_rng(6).uniform(size=(50, 3))
    np.testing.assert_allclose((colours @ MIX + 0.7) @ preview.matrix + preview.offset, colours, atol=2e-3)
    assert fit_preview(encode, LATENT) == preview
    assert all(len(f"{value}") <= 8 for row in preview.matrix for value in row)


def test_an_autoencoder_without_colours() -> None:
    """Then all is of the mean colour, and nothing is blown up."""
    preview = fit_preview(lambda images: [np.full((1, 5, 16, 16), 3.0) for _ in images], LATENT)
    assert preview is not None
    seen = 3.0 * np.sum(preview.matrix, 0) + preview.offset
    assert np.abs(seen - 0.5).max() < 0.1
    assert np.abs(preview.matrix).max() < 1


def test_an_autoencoder_that_overflows() -> None:
    assert fit_preview(lambda images: [np.full((1, 5, 16, 16), np.nan) for _ in images], LATENT) is None


@pytest.fixture(scope="module")
def shapes(shapes_bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.open(shapes_bundle.folder, backend="ort") as pipeline:
        yield pipeline


def likeness(pipeline: Pipeline, **options: Any) -> list[float]:
    """The correlation of each preview with the finished picture, made as small."""
    seen: list[Progress] = []
    (picture,) = pipeline.generate(
        PROMPT, seed=3, guidance_scale=3, callback=seen.append, preview_every=1, **options
    ).images
    previews = [np.asarray(image, np.float64) for progress in seen for image in progress.previews]
    small = picture.resize((picture.width // 8, picture.height // 8), Image.Resampling.BOX)
    wanted = np.asarray(small, np.float64)
    return [float(np.corrcoef(each.ravel(), wanted.ravel())[0, 1]) for each in previews]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_previews_resemble_the_picture(shapes: Pipeline, sampler: str) -> None:
    """At half time already: 0.90 to 0.99 were measured there, and 0.975 to 0.993 at the end."""
    whole = shapes.bundle
    scheduler = {**whole.manifest.scheduler, **SAMPLERS[sampler]}
    shapes.bundle = Bundle(whole.folder, replace(whole.manifest, scheduler=scheduler))
    try:
        found = likeness(shapes, sampler=sampler, num_inference_steps=10)
    finally:
        shapes.bundle = whole
    assert min(found[len(found) // 2 :]) > 0.8
    assert found[-1] > 0.95


def test_a_preview_of_what_a_mask_keeps(shapes: Pipeline) -> None:
    """What is not painted over is seen as it is."""
    size = 128, 128
    mask = Image.new("L", size)
    mask.paste(255, (64, 0, 128, 128))
    seen: list[Progress] = []
    shapes.generate(
        PROMPT,
        seed=1,
        image=Image.new("RGB", size, (20, 200, 40)),
        mask=mask,
        num_inference_steps=4,
        callback=seen.append,
        preview_every=1,
    )
    first = next(progress.previews[0] for progress in seen if progress.previews)
    left = np.asarray(first, np.float64)[:, :6]
    assert np.abs(left.mean((0, 1)) - [20, 200, 40]).max() < 40


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_the_decoder_says_what_is_not_finite(shapes_bundle: Bundle, backend: str, value: float) -> None:
    component = shapes_bundle.component("vae_decoder")
    session = open_session(shapes_bundle.path(component.graph), component, backend, threads=1)
    specs = {spec.name: spec for spec in (*component.inputs, *component.outputs)}
    layout = {name: (spec.resolve({"B": 2, "H": 8, "W": 8}), spec.dtype) for name, spec in specs.items()}
    block = session.memory.allocate(layout)
    binding = session.bind(block.tensors)
    block.tensors["sample"].array[...] = np.random.default_rng(0).normal(size=(2, 4, 8, 8))
    binding.run()
    assert block.tensors["finite"].array.tolist() == [1, 1]
    block.tensors["sample"].array[0, 0, 0, 0] = value
    binding.run()
    assert block.tensors["finite"].array.tolist() == [0, 1]


def test_a_decoder_that_overflows() -> None:
    """In 16 bits a large sample is, and in 32 it is not."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    sample = torch.full((1, 4, 4, 4), 3e5)
    assert ImageDecoder(vae, 1.0)(sample)[1].tolist() == [1]
    assert ImageDecoder(vae.half(), 1.0)(sample)[1].tolist() == [0]
