"""Requests at the door."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from allaprima.bundle import Latent, Manifest, RequestError
from allaprima.runtime import Request, Settings


def test_defaults(manifest: Manifest) -> None:
    settings = Request("a circle", seed=7).check(manifest)
    assert settings == Settings("a circle", None, 4, 3.0, None, 7, 64, 32, 1, 0.0)


def test_everything_given(manifest: Manifest) -> None:
    request = Request("", "no", np.int64(9), np.float32(1.5), "ddim", 2**64 - 3, 96, 128, 3, 1)  # type: ignore[arg-type]
    settings = request.check(manifest)
    assert settings == Settings("", "no", 9, 1.5, "ddim", 2**64 - 3, 96, 128, 3, 1.0)
    assert type(settings.num_inference_steps) is int
    assert type(settings.guidance_scale) is float


def test_random_seed(manifest: Manifest) -> None:
    seeds = {Request("").check(manifest).seed for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(("scale", "branches"), [(-2, 1), (0, 1), (1, 1), (1.001, 2), (7.5, 2)])
def test_branches(manifest: Manifest, scale: float, branches: int) -> None:
    assert Request("", guidance_scale=scale).check(manifest).branches == branches


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "prompt is None: it should be a text"),
        ({"prompt": ["a"]}, r"prompt is \['a'\]: it should be a text"),
        ({"negative_prompt": 3}, "negative_prompt is 3: it should be a text"),
        ({"sampler": 3}, "sampler is 3: it should be a text"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0: it should be at least 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5: it should be a whole number"),
        ({"num_inference_steps": True}, "num_inference_steps is True: it should be a whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan: it should be a finite number"),
        ({"guidance_scale": 1e39}, r"guidance_scale is 1e\+39: it should be a finite number"),
        ({"guidance_scale": 10**400}, "guidance_scale is 10*: it should be a finite number"),
        ({"guidance_scale": "5"}, "guidance_scale is '5': it should be a finite number"),
        ({"num_images": 0}, "num_images is 0: it should be at least 1"),
        ({"seed": -1}, "seed is -1: it should be at least 0"),
        ({"seed": 2**64}, "seed 18446744073709551616 is too large for 1 images"),
        ({"seed": 2**64 - 1, "num_images": 2}, "seed 18446744073709551615 is too large for 2 images"),
        ({"seed": 1.5}, "seed is 1.5: it should be a whole number"),
        ({"eta": 1.5}, "eta is 1.5: it should lie between 0"),
        ({"eta": -0.1}, "eta is -0.1: it should lie between 0"),
        ({"height": 0}, "height is 0: it should be at least 1"),
        ({"height": 100}, "height 100 is not a multiple of 32: the nearest valid sizes are 96 and 128"),
        ({"width": 8}, "width 8 is not a multiple of 32: the nearest valid size is 32"),
        ({"width": "64"}, "width is '64': it should be a whole number"),
        ({"num_images": 10**12}, "num_images 1000000000000 of 32 x 64 pixels is too much at once"),
        ({"height": 32 * 10**9}, "of 32 x 32000000000 pixels is too much at once: at most 268435456 pixels"),
    ],
)
def test_refused(manifest: Manifest, fields: dict[str, Any], message: str) -> None:
    request = Request(**{"prompt": "", **fields})
    with pytest.raises(RequestError, match=message.replace(".5", r"\.5")):
        request.check(manifest)


def test_sizes_follow_the_bundle(manifest: Manifest) -> None:
    coarse = replace(manifest, latent=Latent(4, 8, 64))
    assert Request("", height=128, width=64).check(coarse).height == 128
    with pytest.raises(RequestError, match="nearest valid sizes are 64 and 128"):
        Request("", height=96, width=64).check(coarse)
