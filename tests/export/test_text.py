"""What becomes of prompts, against diffusers' StableDiffusionPipeline."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from allaprima.bundle import Bundle, RequestError
from allaprima.runtime import Pipeline, Result

from .test_parity import psnr

SETTINGS: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 60.0, "width": 96, "height": 64}


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Any:
    """diffusers' pipeline with DDIM."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    if not hasattr(pipeline.text_encoder, "text_model"):  # where diffusers looks for the final layer norm
        object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return pipeline


@pytest.fixture(scope="module", params=["ort", "openvino"])
def pipeline(request: pytest.FixtureRequest, tiny_bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_bundle.folder, backend=request.param, precision="fp32", threads=1) as opened:
        yield opened


def paint(reference: Any, **settings: Any) -> NDArray[np.uint8]:
    made = reference(generator=torch.Generator("cpu").manual_seed(11), output_type="np", **settings)
    picture: NDArray[np.uint8] = (made.images[0] * 255).round().astype(np.uint8)
    return picture


def states(reference: Any, *parts: str) -> torch.Tensor:
    """Hidden states of prompts that fit, one after the other: [1,L,D]."""
    found = [reference.encode_prompt(part, "cpu", 1, False)[0] for part in parts]
    return torch.cat(found, dim=1)


def agree(wanted: NDArray[np.uint8], result: Result, without: NDArray[np.uint8]) -> None:
    """A random model hardly minds its prompt, so being near is not enough: much nearer than `without`."""
    assert psnr(wanted, np.asarray(result.images[0])) >= max(50, psnr(wanted, without) + 20)


@pytest.mark.parametrize("guidance", [1.0, 60.0])
def test_long_prompts(reference: Any, pipeline: Pipeline, guidance: float) -> None:
    settings = {**SETTINGS, "guidance_scale": guidance}
    wanted = paint(
        reference,
        prompt_embeds=states(reference, "a red circle", "a blue square", "a green star"),
        negative_prompt_embeds=states(reference, "dark", "", ""),
        **settings,
    )
    without = paint(reference, prompt="a red circle", negative_prompt="dark", **settings)
    prompt = "a red circle BREAK a blue square BREAK a green star"
    negative = "dark" if guidance > 1 else ""
    result = pipeline.generate(
        prompt, negative_prompt=negative, long_prompts=True, sampler="ddim", seed=11, **settings
    )
    agree(wanted, result, without)
    assert result.warnings == ()


def test_weights(reference: Any, pipeline: Pipeline) -> None:
    ids = reference.tokenizer("a red circle").input_ids
    red = ids.index(reference.tokenizer("red").input_ids[1])
    prompt = states(reference, "a red circle")
    weighted = prompt.clone()
    weighted[:, red] *= 1.4
    weighted *= prompt.mean() / weighted.mean()
    wanted = paint(
        reference, prompt_embeds=weighted, negative_prompt_embeds=states(reference, ""), **SETTINGS
    )
    without = paint(reference, prompt="a red circle", **SETTINGS)
    result = pipeline.generate("a (red:1.4) circle", prompt_weights=True, sampler="ddim", seed=11, **SETTINGS)
    agree(wanted, result, without)


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip(reference: Any, pipeline: Pipeline, skip: int) -> None:
    prompt = {"prompt": "a red circle", "negative_prompt": "dark"}
    wanted = paint(reference, **prompt, clip_skip=skip, **SETTINGS)
    without = paint(reference, **prompt, clip_skip=skip - 1, **SETTINGS)
    result = pipeline.generate(**prompt, clip_skip=skip, sampler="ddim", seed=11, **SETTINGS)
    agree(wanted, result, without)
    assert result.parameters[0].clip_skip == skip


def test_no_clip_skip(pipeline: Pipeline) -> None:
    pictures = [
        np.asarray(pipeline.generate("a red circle", clip_skip=skip, seed=1, **SETTINGS).images[0])
        for skip in (0, None)
    ]
    assert np.array_equal(*pictures)
    with pytest.raises(RequestError, match="clip_skip is 3: the text encoder has 2 layers, so at most 2"):
        pipeline.generate("", clip_skip=3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_guidance_rescale(
    reference: Any, pipeline: Pipeline, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = diffusers.DDIMScheduler.from_config(reference.scheduler.config, prediction_type=prediction)
    monkeypatch.setattr(reference, "scheduler", scheduler)
    manifest = pipeline.bundle.manifest
    manifest = replace(manifest, scheduler={**manifest.scheduler, "prediction_type": prediction})
    bundle = replace(pipeline.bundle, manifest=manifest)
    other = Pipeline(bundle, vars(pipeline)["_components"].sessions, backend=pipeline.backend)
    prompt = {"prompt": "a red circle", "negative_prompt": "dark"}
    wanted = paint(reference, **prompt, guidance_rescale=0.7, **SETTINGS)
    without = paint(reference, **prompt, **SETTINGS)
    result = other.generate(**prompt, guidance_rescale=0.7, sampler="ddim", seed=11, num_images=2, **SETTINGS)
    agree(wanted, result, without)
    assert result.parameters[0].guidance_rescale == 0.7
    after = other.generate(**prompt, sampler="ddim", seed=11, num_images=2, **SETTINGS)
    assert psnr(without, np.asarray(after.images[0])) >= 50


def test_guidance_rescale_without_guidance(pipeline: Pipeline) -> None:
    settings = {**SETTINGS, "guidance_scale": 1.0, "seed": 1}
    plain = pipeline.generate("a", **settings)
    result = pipeline.generate("a", guidance_rescale=0.7, **settings)
    assert result.warnings == ("guidance_rescale has no effect with guidance_scale 1.0: it needs above 1",)
    assert np.array_equal(np.asarray(plain.images[0]), np.asarray(result.images[0]))
