"""Previews: what every sampler expects to paint, as small pictures."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allaprima.bundle import Bundle, Preview, RequestError, open_bundle
from allaprima.bundle.store import BundleWriter
from allaprima.runtime import Pipeline, Progress
from allaprima.runtime.preview import colours
from allaprima.runtime.samplers import Table, make_table, names

from .trajectories import F64, SD

PROMPT = "a red circle"
PREVIEW = Preview(
    matrix=((0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5), (0.0, 0.0, 0.0)), offset=(0.5, 0.5, 0.5)
)
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
NOISE_SOLVER = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}


def clean_samples(table: Table, kind: str) -> tuple[F64, list[F64]]:
    """A clean sample, and what the table says of it after each call of a model that knows it."""
    assert table.levels is not None
    random = np.random.default_rng(3)
    wanted, noise = random.standard_normal((2, 6))
    sample = table.levels[0, 0] * wanted + table.levels[0, 1] * noise
    history = np.zeros((table.update.shape[1] - 4, 6))
    found = []
    for row, (clean, level) in enumerate(table.levels.astype(np.float64)):
        noise = (sample - clean * wanted) / level
        size = np.hypot(clean, level)
        outputs = {
            "epsilon": noise,
            "v_prediction": (clean * noise - level * wanted) / size,
            "sample": wanted,
            "flow": noise - wanted,
        }
        p, q = table.to_prediction[row].astype(np.float64)
        prediction = p * sample + q * outputs[kind]
        terms = np.stack([sample, prediction, random.standard_normal(6), *history, prediction])
        sample = table.update[row].astype(np.float64) @ terms
        history = np.concatenate([prediction[None], history])[: len(history)]
        found.append(table.clean[row].astype(np.float64) @ np.stack([sample, prediction]))
    return wanted, found


def config_of(sampler: str, kind: str) -> dict[str, Any]:
    if sampler == "unclip":
        return {"_class_name": "UnCLIPScheduler", "clip_sample": False, "prediction_type": kind}
    return FLOW if kind == "flow" else {**SD, "prediction_type": kind}


def tables() -> Iterator[tuple[str, str, int]]:
    """Every sampler, with the kinds of models that it takes, from the beginning and in the middle."""
    for info, kind, begin in product(names(), ("epsilon", "v_prediction", "sample", "flow"), (0, 3)):
        if begin and info.name == "pndm":
            continue  # diffusers then takes every step from a level that the sample is not at
        with suppress(RequestError):
            make_table(config_of(info.name, kind), info.name, 8, history=4, begin=begin)
            yield info.name, kind, begin


TABLES = list(tables())


@pytest.mark.parametrize(("sampler", "kind", "begin"), TABLES)
def test_a_model_that_knows_the_picture(sampler: str, kind: str, begin: int) -> None:
    """Then every preview is that picture, whatever the sampler keeps as its prediction."""
    config = config_of(sampler, kind)
    table = make_table(config, sampler, 8, history=4, begin=begin)
    if table.levels is None:
        table = replace(table, levels=make_table(config, sampler.replace("2s", "2m"), 8, history=4).levels)
    wanted, found = clean_samples(table, kind)
    # Outputs of several levels, extrapolated, are exact if they are the noise, but not if they are v.
    slack = 0.1 if (sampler, kind) == ("pndm", "v_prediction") else 2e-3
    np.testing.assert_allclose(found, np.tile(wanted, (len(found), 1)), atol=slack)


def test_every_sampler_was_tried() -> None:
    assert {sampler for sampler, _, _ in TABLES} == {info.name for info in names()}


@pytest.mark.parametrize(
    ("sampler", "options"),
    [("dpmpp_2m", NOISE_SOLVER), ("unipc", {"predict_x0": False, "final_sigmas_type": "sigma_min"})],
)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_solvers_of_the_noise(sampler: str, options: dict[str, Any], kind: str) -> None:
    config = {**SD, "prediction_type": kind, **options}
    wanted, found = clean_samples(make_table(config, sampler, 8, history=4), kind)
    np.testing.assert_allclose(found, np.tile(wanted, (8, 1)), atol=2e-3)


@pytest.fixture
def shown(bundle: Bundle) -> Bundle:
    """The tiny bundle with a map to colours, which is its decoder's."""
    return Bundle(bundle.folder, replace(bundle.manifest, preview=PREVIEW))


@pytest.fixture
def ort(shown: Bundle) -> Iterator[Pipeline]:
    with Pipeline.open(shown.folder, backend="ort", threads=1) as opened:
        opened.bundle = shown
        yield opened


def test_every_few_steps(ort: Pipeline) -> None:
    seen: list[Progress] = []
    result = ort.generate(
        PROMPT, seed=3, num_inference_steps=5, num_images=2, callback=seen.append, preview_every=2
    )
    assert [(each.stage, each.step) for each in seen if each.previews] == [("denoise", 2), ("denoise", 4)]
    for progress in seen:
        for image in progress.previews:
            assert (image.size, image.mode) == ((4, 8), "RGB")
    assert [len(each.previews) for each in seen if each.previews] == [2, 2]
    assert np.array_equal(
        np.asarray(result.images[0]),
        np.asarray(ort.generate(PROMPT, seed=3, num_inference_steps=5).images[0]),
    )


def test_the_last_one_is_the_picture(ort: Pipeline) -> None:
    """DDIM ends in its last prediction, and here the decoder is the same map."""
    seen: list[Progress] = []
    ort.bundle = Bundle(
        ort.bundle.folder,
        replace(ort.bundle.manifest, scheduler={**ort.bundle.manifest.scheduler, "set_alpha_to_one": True}),
    )
    result = ort.generate(PROMPT, seed=3, num_images=2, callback=seen.append, preview_every=4)
    for image, small in zip(result.images, seen[4].previews, strict=True):
        whole = np.asarray(image, np.int64)[::8, ::8]
        assert np.abs(whole - np.asarray(small, np.int64)).max() <= 1
        assert np.asarray(small).std() > 20


@pytest.mark.parametrize("never", [None, 0])
def test_none_if_none_are_asked_for(ort: Pipeline, never: int | None) -> None:
    seen: list[Progress] = []
    ort.generate(PROMPT, callback=seen.append, preview_every=never)
    assert not any(progress.previews for progress in seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preview_every": 2}, "preview_every is 2, but there is no callback"),
        ({"preview_every": -1, "callback": print}, "preview_every is -1: it should be at least 0"),
        ({"preview_every": "2", "callback": print}, "preview_every is '2': it should be a whole number"),
    ],
)
def test_refused(ort: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ort.generate(PROMPT, **options)


def test_a_bundle_without(bundle: Bundle) -> None:
    with (
        Pipeline.open(bundle.folder, backend="ort", threads=1) as pipeline,
        pytest.raises(RequestError, match="the bundle tiny says nothing of how its latents look: export"),
    ):
        pipeline.generate(PROMPT, callback=lambda progress: None, preview_every=1)


def test_colours() -> None:
    latents = np.zeros((1, 4, 1, 3), np.float32)
    latents[0, :, 0, 1] = [1.0, -9.0, 0.2, 7.0]
    latents[0, :, 0, 2] = [np.nan, 0.0, np.inf, 0.0]
    assert colours(PREVIEW, latents).tolist() == [[[[128] * 3, [255, 0, 153], [128, 128, 255]]]]


def test_in_the_manifest(shown: Bundle, tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "shown") as writer:
        for name in shown.manifest.files:
            (writer.folder / name).parent.mkdir(exist_ok=True)
            (writer.folder / name).write_bytes((shown.folder / name).read_bytes())
        writer.commit(replace(shown.manifest, files={}))
    assert open_bundle(tmp_path / "shown").manifest.preview == PREVIEW
    with pytest.raises(ValueError, match="preview has 3 rows for 4 channels"):
        replace(shown.manifest, preview=replace(PREVIEW, matrix=PREVIEW.matrix[:3]))
    with pytest.raises(ValueError, match="not a map to three colours"):
        replace(PREVIEW, offset=(float("nan"), 0.0, 0.0))
