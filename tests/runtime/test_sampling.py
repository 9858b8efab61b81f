"""What a request asks of its sampler: read, checked, painted, written down and read again."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from allaprima.bundle import Bundle, BundleError, Manifest, RequestError
from allaprima.runtime import Pipeline, Request, Sampling, read_parameters, save_image
from allaprima.runtime.noise import Draws, Noise
from allaprima.runtime.samplers import make_table
from allaprima.runtime.stages import Denoiser

ALIGNED = (999, 850, 645, 455, 24)


@pytest.fixture
def ort(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.open(bundle.folder, backend="ort", threads=1) as opened:
        yield opened


def test_a_custom_schedule_says_the_number_of_steps(manifest: Manifest) -> None:
    sampling = Sampling(timesteps=ALIGNED)
    settings = Request("", sampler="euler", sampling=sampling).check(manifest)
    assert settings.num_inference_steps == 5  # the bundle's own are 4
    assert (
        Request("", sampler="euler", sampling={"sigmas": [9, 3, 0]}).check(manifest).num_inference_steps == 2
    )
    picture = Image.new("RGB", (64, 64))
    request = Request("", sampler="euler", sampling=sampling, image=picture, strength=0.5)
    assert request.check(manifest).begin == 3
    with pytest.raises(RequestError, match="num_inference_steps 7 contradicts the custom schedule of 5"):
        Request("", num_inference_steps=7, sampler="euler", sampling=sampling).check(manifest)


def test_arrays_are_lists(manifest: Manifest) -> None:
    given = {
        "timesteps": np.array(ALIGNED),
        "scheduler": {"beta_start": np.float32(0.5), "trained_betas": None},
    }
    sampling = Request("", sampler="euler", sampling=given).check(manifest).sampling
    assert sampling == Sampling(timesteps=list(ALIGNED), scheduler={"beta_start": 0.5, "trained_betas": None})
    assert Sampling.read(Sampling(sigmas=(2.0, 0.0))).sigmas == [2, 0]
    assert Sampling.read(None) == Sampling()


def test_what_is_written_down() -> None:
    assert Sampling().to_json() == {}
    given = {
        "timesteps": [9, 4],
        "s_churn": 2.0,
        "s_tmax": 5.0,
        "scheduler": {"timestep_spacing": "trailing"},
    }
    assert json.loads(json.dumps(Sampling.read(given).to_json())) == given


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"timestep": [1]}, "sampling has no field 'timestep': did you mean 'timesteps'"),
        ("trailing", "sampling is 'trailing': it should be a Sampling or a mapping"),
        ({"timesteps": [5, 9]}, r"timesteps \[5, 9\] must descend"),
        ({"timesteps": "abc"}, "timesteps 'abc' are not numbers"),
        ({"order": 2}, "order 2 means nothing to sampler 'euler'"),
        ({"s_churn": None}, "s_churn None is not a number"),
        ({"scheduler": {"timestep_spacing": "odd"}}, "timestep_spacing='odd'"),
        ({"scheduler": {"_class_name": "DDIMScheduler"}}, "'_class_name' means nothing to sampler 'euler'"),
        ({"scheduler": 3}, "scheduler options 3 are not a mapping"),
    ],
)
def test_refused(ort: Pipeline, sampling: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ort.generate("", sampler="euler", sampling=sampling, callback=lambda _: pytest.fail("painted"))


@pytest.mark.parametrize(
    ("sampler", "sampling"),
    [
        ("euler", {"s_churn": 9.0, "scheduler": {"timestep_spacing": "trailing"}}),
        ("dpmpp_2m", {"timesteps": list(ALIGNED)}),
        ("ddim", {"scheduler": {"clip_sample": True, "clip_sample_range": 0.5}}),
        ("dpmpp_sde", {"s_noise": 0.9}),
        ("Euler Beta", {}),
    ],
)
def test_a_picture_can_be_made_again(
    ort: Pipeline, sampler: str, sampling: dict[str, Any], tmp_path: Path
) -> None:
    result = ort.generate("a", seed=3, sampler=sampler, sampling=sampling, num_images=2)
    plain = ort.generate("a", seed=4, sampler="lms", num_inference_steps=5)
    save_image(result.images[1], tmp_path / "a.png", result.parameters[1])
    read = read_parameters(tmp_path / "a.png")
    assert read["sampling"] == sampling
    names = ("prompt", "seed", "sampler", "sampling", "num_inference_steps", "guidance_scale")
    again = ort.generate(**{name: read[name] for name in names})
    assert np.array_equal(result.images[1], again.images[0])
    assert not np.array_equal(plain.images[0], again.images[0])
    assert asdict(again.parameters[0]) == read


def test_what_the_graph_cannot_do(ort: Pipeline) -> None:
    """That of these tests neither thresholds nor learns variances."""
    for sampler, options in (
        ("ddim", {"thresholding": True, "sample_max_value": 2.0}),
        ("deis", {"thresholding": True}),
        ("ddpm", {"variance_type": "learned_range"}),
    ):
        with pytest.raises(RequestError, match=f"sampler '{sampler}' .* is more than this bundle's denoiser"):
            ort.generate("", sampler=sampler, sampling={"scheduler": options})
    ort.generate("", sampler="ddim", sampling={"scheduler": {"thresholding": True}})  # no more than a clamp


def test_graph_of_another_version(ort: Pipeline) -> None:
    session = vars(ort)["_components"].sessions["denoiser"]
    with pytest.raises(BundleError, match=r"8 columns, not 7.*export the checkpoint again"):
        Denoiser(session, (1, 4, 8, 4), branches=1, history=3, length=77)


def test_echo_of_the_last_draw() -> None:
    draws, noise = Draws([Noise(1), Noise(2)]), np.empty((2, 4, 5, 6), np.float32)
    draws.fill(noise, 0.0)
    first = noise.copy()
    draws.fill(noise, -0.5)
    streams = [Noise(1), Noise(2)]
    wanted = [[stream.normal((4, 5, 6)) for _ in range(3)] for stream in streams]
    for lane in (0, 1):
        np.testing.assert_array_equal(first[lane], wanted[lane][0])
        np.testing.assert_allclose(noise[lane], wanted[lane][1] - 0.5 * wanted[lane][0], rtol=1e-6)
    draws.fill(noise, 1.0)  # of the draw before, not of what was made of it
    np.testing.assert_allclose(noise[0], wanted[0][2] + wanted[0][1], rtol=1e-6)


def test_options_count_in_the_table(manifest: Manifest) -> None:
    settings = Request("", sampling={"scheduler": {"timestep_spacing": "trailing"}}).check(manifest)
    table = make_table(manifest.scheduler, None, 4, history=4, **settings.sampling.arguments())
    assert table.timesteps.tolist() == [999, 749, 499, 249]
