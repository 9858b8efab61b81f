"""Pictures that take their steps together are those that they are alone, whoever comes and goes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from allaprima.bundle import BackendError, Bundle, RequestError
from allaprima.runtime import Pipeline, Request
from allaprima.runtime.lanes import Lanes, powers_of_two
from allaprima.runtime.painting import Painting

SAMPLERS = ("euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "ddim", "unipc", "heun", "lms", "deis")
SIZE: Any = {"height": 32, "width": 32}


@pytest.fixture
def ort(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.open(bundle.folder, backend="ort", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def shapes() -> Iterator[Pipeline]:
    with Pipeline.open("shapes", backend="ort", threads=1) as opened:
        yield opened


def begin(pipeline: Pipeline, request: Request, **options: Any) -> Painting:
    (settled,) = pipeline.settle(request)
    return pipeline.prepare(settled, **options)


def paint(lanes: Lanes, *paintings: Painting) -> None:
    """Step until all of them are done, and let them go."""
    while any(not painting.done for painting in paintings):
        lanes.step()
        for painting in lanes.paintings:
            if painting.done:
                lanes.release(painting)


def latents(pipeline: Pipeline, painting: Painting) -> NDArray[np.float32]:
    made = pipeline.finish(painting).latents
    assert made is not None
    return made


Arrival = tuple[int, int, str, int]
"""When it comes, how many steps it wants, the sampler, and after which call it gives up (0 is never)."""
ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 6),
        st.integers(2, 6),
        st.sampled_from(SAMPLERS),
        st.sampled_from((0, 0, 0, 1, 3)),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=20, deadline=None)
@given(arrivals=ARRIVALS, sizes=st.sampled_from((None, (1, 2, 4, 8))))
def test_neighbours_change_nothing(
    shapes: Pipeline, arrivals: list[Arrival], sizes: tuple[int, ...] | None
) -> None:
    """Equal to the bit, in fp32 on ONNX Runtime, with the trained model."""
    requests = [
        Request(
            f"a red circle {seed}",
            seed=seed,
            num_inference_steps=steps,
            sampler=sampler,
            output_type="latent",
            **SIZE,
        )
        for seed, (_, steps, sampler, _) in enumerate(arrivals)
    ]
    waiting = [begin(shapes, request) for request in requests]
    lanes = Lanes(functools.partial(vars(shapes)["_stages"].make_denoiser, waiting[0].shape), sizes)
    for moment in range(40):
        for painting, (comes, *_) in zip(waiting, arrivals, strict=True):
            if comes == moment:
                lanes.admit(painting)
        if lanes.paintings:
            lanes.step()
        for painting in lanes.paintings:
            gives_up = arrivals[waiting.index(painting)][3]
            if painting.done or painting.row == gives_up:
                lanes.release(painting)
    assert not lanes.paintings
    for painting, request in zip(waiting, requests, strict=True):
        if painting.done:
            alone = shapes.paint(request).latents
            assert alone is not None
            np.testing.assert_array_equal(latents(shapes, painting), alone)


def test_a_picture_that_was_let_go_can_go_on(ort: Pipeline) -> None:
    """Its state is its own between two batches, and may go to another one."""
    request = Request("a", seed=3, num_inference_steps=6, sampler="dpmpp_2m", output_type="latent")
    one, other = (begin(ort, request) for _ in range(2))
    first, second = ort.lanes(one.shape, 4), ort.lanes(one.shape, 4)
    first.admit(one)
    first.admit(other)
    for _ in range(3):
        first.step()
    first.release(one)
    assert (one.row, one.done) == (3, False)
    second.admit(one)
    paint(second, one)
    np.testing.assert_array_equal(latents(ort, one), ort.paint(request).latents)
    assert first.paintings == (other,)


def test_dropped_buffers_lose_nothing(ort: Pipeline) -> None:
    request = Request("a", seed=3, num_inference_steps=5, output_type="latent")
    painting = begin(ort, request)
    lanes = ort.lanes(painting.shape, 2)
    lanes.admit(painting)
    lanes.step()
    lanes.drop()
    paint(lanes, painting)
    np.testing.assert_array_equal(latents(ort, painting), ort.paint(request).latents)


def test_pictures_of_one_request(ort: Pipeline) -> None:
    """Settled one by one they are those of the request."""
    request = Request(
        "a", negative_prompt="b", seed=5, num_images=3, num_inference_steps=4, guidance_rescale=0.0
    )
    whole = ort.paint(request)
    paintings = [ort.prepare(each) for each in ort.settle(request)]
    lanes = ort.lanes(paintings[0].shape, 3)
    for painting in paintings:
        lanes.admit(painting)
    paint(lanes, *paintings)
    for painting, image, parameters in zip(paintings, whole.images, whole.parameters, strict=True):
        alone = ort.finish(painting)
        assert alone.images[0].tobytes() == image.tobytes()
        assert alone.parameters == (parameters,)
        assert alone.timings["total"] == pytest.approx(sum(alone.timings[stage] for stage in STAGES))


STAGES = ("encode", "denoise", "decode")


def test_variations_and_latents_of_one_request(shapes: Pipeline) -> None:
    begun = shapes.paint(
        Request(
            "a", seed=1, num_images=2, num_inference_steps=3, output_type="latent", denoising_end=0.5, **SIZE
        )
    ).latents
    assert begun is not None
    for request in (
        Request(
            "a", seed=1, variation_seed=9, variation_strength=0.3, num_images=2, num_inference_steps=2, **SIZE
        ),
        Request("a", seed=1, num_images=2, num_inference_steps=3, image=begun, denoising_start=0.5, **SIZE),
    ):
        whole = shapes.paint(request)
        for settled, image, parameters in zip(
            shapes.settle(request), whole.images, whole.parameters, strict=True
        ):
            painting = shapes.prepare(settled)
            lanes = shapes.lanes(painting.shape, 1)
            lanes.admit(painting)
            paint(lanes, painting)
            alone = shapes.finish(painting)
            assert alone.images[0].tobytes() == image.tobytes()
            assert alone.parameters == (parameters,)


def test_masks_and_previews(shapes: Pipeline) -> None:
    """A masked picture beside one that is not, each with previews at its own time."""
    picture = Image.new("RGB", (32, 32), "blue")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    masked = Request("a red circle", seed=2, num_inference_steps=4, image=picture, mask=mask, **SIZE)
    plain = Request("a red circle", seed=3, num_inference_steps=5, **SIZE)
    wanted = ((masked, 2), (plain, 3))
    seen: list[list[bytes]] = [[], []]
    wholes = [
        shapes.paint(
            request,
            callback=lambda told, shown=shown: shown.extend(each.tobytes() for each in told.previews),
            preview_every=every,
        )
        for (request, every), shown in zip(wanted, seen, strict=True)
    ]
    paintings = [begin(shapes, request, preview_every=every) for request, every in wanted]
    lanes = shapes.lanes(paintings[0].shape, 2)
    for painting in paintings:
        lanes.admit(painting)
    together: list[list[bytes]] = [[], []]
    while lanes.paintings:
        for painting, image in lanes.step():
            together[paintings.index(painting)].append(image.tobytes())
        for painting in lanes.paintings:
            if painting.done:
                lanes.release(painting)
    assert together == seen
    assert [len(each) for each in together] == [2, 1]
    for painting, whole in zip(paintings, wholes, strict=True):
        assert shapes.finish(painting).images[0].tobytes() == whole.images[0].tobytes()


def test_warnings_are_kept(shapes: Pipeline) -> None:
    painting = begin(shapes, Request("a red circle " * 60, num_inference_steps=1, **SIZE))
    lanes = shapes.lanes(painting.shape, 1)
    lanes.admit(painting)
    paint(lanes, painting)
    assert "too long" in shapes.finish(painting).warnings[0]


def test_what_cannot_be_painted_together(ort: Pipeline, shapes: Pipeline) -> None:
    with pytest.raises(RequestError, match="num_inference_steps is 0"):
        ort.settle(Request("", num_inference_steps=0))
    with pytest.raises(RequestError, match="preview_every is -1"):
        begin(shapes, Request("", **SIZE), preview_every=-1)
    with pytest.raises(RequestError, match="there is no sampler 'best'"):
        begin(ort, Request("", sampler="best"))


def test_a_failed_step_leaves_all_as_before(ort: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request("a", seed=3, num_inference_steps=3, output_type="latent")
    painting = begin(ort, request)
    lanes = ort.lanes(painting.shape, 1)
    lanes.admit(painting)
    lanes.step()

    def fail(*_: object, **__: object) -> None:
        raise BackendError("no power")

    with monkeypatch.context() as patch:
        patch.setattr("allaprima.runtime.stages.Denoiser.step", fail)
        with pytest.raises(BackendError, match="no power"):
            lanes.step()
    assert painting.row == 1
    paint(lanes, painting)
    np.testing.assert_array_equal(latents(ort, painting), ort.paint(request).latents)


def test_a_closed_pipeline(bundle: Bundle, tmp_path: Path) -> None:
    with Pipeline.open(bundle.folder, backend="ort", threads=1) as opened:
        (settled,) = opened.settle(Request(""))
    with pytest.raises(BackendError, match="the pipeline is closed"):
        opened.prepare(settled)


def test_powers_of_two() -> None:
    assert [powers_of_two(most) for most in (1, 2, 3, 4, 6, 8)] == [
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 4),
        (1, 2, 4, 6),
        (1, 2, 4, 8),
    ]
