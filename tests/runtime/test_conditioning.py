"""Long and weighted prompts, from the request to the denoiser's conditions."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from allaprima.bundle import Bundle, RequestError, TensorSpec
from allaprima.runtime import Pipeline, Result, open_session
from allaprima.runtime.tokenizer import Tokenizer

LONG = "x" * 75 + " and  More"


@pytest.fixture(params=["ort", "openvino"])
def pipeline(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.open(bundle.folder, backend=request.param, precision="fp32", threads=1) as opened:
        yield opened


def pixels(result: Result) -> NDArray[np.uint8]:
    return np.asarray(result.images[0])


def conditions(pipeline: Pipeline) -> NDArray[np.float32]:
    """What the last request gave the denoiser, [G,B,L,D]."""
    *_, denoiser = vars(vars(pipeline)["_stages"])["_denoisers"].values()
    array: NDArray[np.float32] = denoiser.conditions["encoder_hidden_states"].array
    return array


def test_long_prompts(
    pipeline: Pipeline, bundle: Bundle, hidden_states: Callable[[Any], NDArray[np.float64]]
) -> None:
    result = pipeline.generate(LONG, negative_prompt="dull", seed=1, num_images=2, long_prompts=True)
    assert result.warnings == ()
    assert result.parameters[0].long_prompts
    found = conditions(pipeline)
    assert found.shape == (2, 2, 154, 6)
    tokenizer = Tokenizer(bundle)
    for branch, parts in enumerate((("dull", ""), ("x" * 75, "and  More"))):
        wanted = np.concatenate([hidden_states(tokenizer.encode(part).ids) for part in parts])
        for lane in range(2):
            np.testing.assert_allclose(found[branch, lane], wanted, atol=1e-4)
    pipeline.generate("short", seed=1)
    assert conditions(pipeline).shape == (2, 1, 77, 6)


def test_weights(
    pipeline: Pipeline, bundle: Bundle, hidden_states: Callable[[Any], NDArray[np.float64]]
) -> None:
    plain = pipeline.generate("a red circle", negative_prompt="d", seed=1)
    result = pipeline.generate("a (red:1.5) circle", negative_prompt="d", seed=1, prompt_weights=True)
    assert result.parameters[0].prompt_weights
    assert not np.array_equal(pixels(plain), pixels(result))
    ids = Tokenizer(bundle).encode("a red circle").ids
    states = hidden_states(ids)
    weighted = states * np.where(np.isin(np.arange(77), [2, 3, 4]), 1.5, 1)[:, None]
    weighted *= states.mean() / weighted.mean()
    negative, positive = conditions(pipeline)[:, 0]
    np.testing.assert_allclose(positive, weighted, atol=1e-4)
    np.testing.assert_allclose(negative, hidden_states(Tokenizer(bundle).encode("d").ids), atol=1e-4)


@pytest.mark.parametrize("prompt", ["", "a red circle", "a, b: c; d", "x" * 75])
def test_a_plain_prompt_does_not_mind(pipeline: Pipeline, prompt: str) -> None:
    plain = pipeline.generate(prompt, negative_prompt="dull, grey", seed=1)
    both = pipeline.generate(
        prompt, negative_prompt="dull, grey", seed=1, long_prompts=True, prompt_weights=True
    )
    assert np.array_equal(pixels(plain), pixels(both))
    assert both.warnings == ()


def test_cut_unless_asked_for(pipeline: Pipeline) -> None:
    for options in ({}, {"prompt_weights": True}):
        result = pipeline.generate(LONG, seed=1, **options)
        assert result.warnings == ('the prompt is too long, this was left out: "and  More"',)


def test_a_bundle_for_one_chunk(bundle: Bundle) -> None:
    sessions = {}
    for role in ("text_encoder", "denoiser", "vae_decoder"):
        component = bundle.component(role)
        if role == "denoiser":
            *inputs, states = component.inputs
            inputs.append(TensorSpec(states.name, states.dtype, ("G*B", 77, 6)))
            component = replace(component, inputs=tuple(inputs))
        sessions[role] = open_session(bundle.path(component.graph), component, "ort", threads=1)
    with Pipeline(bundle, sessions, backend="ort") as pipeline:
        plain = pipeline.generate("a red circle", seed=1)
        again = pipeline.generate("a red circle", seed=1, long_prompts=True)
        assert np.array_equal(pixels(plain), pixels(again))
        with pytest.raises(RequestError, match=r"needs 2 chunks.*takes one, of 77 tokens: export"):
            pipeline.generate(LONG, long_prompts=True)


@pytest.mark.parametrize("name", ["long_prompts", "prompt_weights"])
def test_no_flag(pipeline: Pipeline, name: str) -> None:
    options: dict[str, Any] = {name: "yes"}
    with pytest.raises(RequestError, match=f"{name} is 'yes': it should be True or False"):
        pipeline.generate("", **options)


def test_a_text_encoder_that_cannot_skip(pipeline: Pipeline) -> None:
    pipeline.generate("", clip_skip=0, seed=1)
    with pytest.raises(RequestError, match=r"clip_skip is 2, but .* cannot skip layers: export"):
        pipeline.generate("", clip_skip=2)


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_no_clip_skip(pipeline: Pipeline, value: Any) -> None:
    with pytest.raises(RequestError, match=f"clip_skip is {value}: it should be"):
        pipeline.generate("", clip_skip=value)


def test_a_denoiser_that_cannot_rescale(pipeline: Pipeline) -> None:
    pipeline.generate("", guidance_rescale=0, seed=1)
    with pytest.raises(RequestError, match=r"guidance_rescale is 0.7, but .* cannot rescale: export"):
        pipeline.generate("", guidance_rescale=0.7)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "x"])
def test_no_share(pipeline: Pipeline, value: Any) -> None:
    with pytest.raises(RequestError, match=r"guidance_rescale is .*: it should"):
        pipeline.generate("", guidance_rescale=value)
