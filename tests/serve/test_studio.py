"""The studio on the trained model: pictures are those of a pipeline that has nothing else to do."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allaprima.bundle import BackendError, RequestError
from allaprima.runtime import Pipeline, Request, Result
from allaprima.serve.errors import CancelledError, DeadlineError, DrainingError, UnknownModelError
from allaprima.serve.jobs import Job, Order
from allaprima.serve.studio import Studio

SMALL: Any = {"height": 32, "width": 32}
LONG: Any = {"height": 128, "width": 128, "num_inference_steps": 150}


def opens(folder: Path, limit: int | None) -> Pipeline:
    return Pipeline.open(folder, backend="ort", threads=1, memory_limit=limit)


@pytest.fixture(scope="module")
def studio() -> Iterator[Studio]:
    made = Studio(["shapes"], opens, lanes=3, warm=[(32, 32)])
    made.start()
    assert made.wait_ready(60)
    yield made
    made.close(60)


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.open("shapes", backend="ort", threads=1) as opened:
        yield opened


@functools.cache
def alone(pipeline: Pipeline, seed: int, steps: int, sampler: str, side: int) -> tuple[bytes, ...]:
    made = pipeline.generate(
        "a red circle",
        seed=seed,
        num_inference_steps=steps,
        sampler=sampler,
        height=side,
        width=side,
        num_images=2,
    )
    return tuple(image.tobytes() for image in made.images)


def done(job: Job, timeout: float = 60) -> Result:
    """Wait for a job from a thread without a loop."""
    return asyncio.run(asyncio.wait_for(job.wait(), timeout))


def until(true: Any, timeout: float = 30) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


ASKED = st.tuples(
    st.sampled_from((1, 2, 3)),  # steps
    st.sampled_from(("euler", "euler_a", "dpmpp_2m")),
    st.sampled_from((32, 64)),
    st.sampled_from((0.0, 0.0, 0.01, 0.05)),  # seconds after which it comes
    st.sampled_from((None, None, None, 0.0, 0.03)),  # seconds after which it is cancelled
)


@settings(max_examples=8, deadline=None)
@given(st.lists(ASKED, min_size=2, max_size=8))
def test_same_picture_whoever_comes_and_goes(studio: Studio, pipeline: Pipeline, asked: list[Any]) -> None:
    """Requests of two sizes that come and are cancelled at random; equal to the bit."""

    def order(seed: int, steps: int, sampler: str, side: int) -> Job:
        request = Request(
            "a red circle",
            seed=seed,
            num_inference_steps=steps,
            sampler=sampler,
            height=side,
            width=side,
            num_images=2,
        )
        return studio.submit(Order(request))

    async def one(seed: int, steps: int, sampler: str, side: int, after: float, stop: float | None) -> Job:
        await asyncio.sleep(after)
        job = order(seed, steps, sampler, side)
        if stop is not None:
            await asyncio.sleep(stop)
            job.cancel()
        try:
            await job.wait()
        except CancelledError:
            assert stop is not None
        return job

    async def everything() -> list[Job]:
        return await asyncio.gather(*(one(seed, *each) for seed, each in enumerate(asked)))

    for seed, (job, (steps, sampler, side, *_)) in enumerate(
        zip(asyncio.run(everything()), asked, strict=True)
    ):
        if job.result is not None:
            made = tuple(image.tobytes() for image in job.result.images)
            assert made == alone(pipeline, seed, steps, sampler, side)
    assert studio.load().lanes == {}


def test_a_picture_joins_and_overtakes(studio: Studio) -> None:
    """One of few steps that comes later is done first: nobody waits for a batch to end."""
    long = studio.submit(Order(Request("a", seed=1, **LONG)))
    until(lambda: long.status.step > 2)
    short = studio.submit(Order(Request("a", seed=2, height=128, width=128, num_inference_steps=3)))
    done(short)
    assert long.status.state == "running"
    long.cancel()
    until(lambda: long.status.state == "cancelled")


def test_other_sizes_take_turns(studio: Studio) -> None:
    large = [studio.submit(Order(Request("a", seed=seed, **LONG))) for seed in range(3)]
    until(lambda: all(job.status.step > 0 for job in large))
    waiting = studio.submit(Order(Request("a", **LONG)))
    small = studio.submit(Order(Request("a", num_inference_steps=3, **SMALL)))
    done(small)
    assert waiting.status.position == 1  # all lanes of its size are taken, which is nobody else's matter
    assert studio.load().lanes == {("shapes", 128, 128): 3}
    assert (studio.load().queued, studio.load().running) == (1, 3)
    for job in (*large, waiting):
        job.cancel()
    until(lambda: not studio.jobs())
    assert studio.load().lanes == {}


def test_what_a_job_tells(studio: Studio) -> None:
    job = studio.submit(Order(Request("a", num_inference_steps=4, num_images=2, **SMALL), preview_every=2))

    async def follow() -> list[Any]:
        return [event async for event in job.events()]

    events = asyncio.run(follow())
    steps = [event.status.step for event in events]
    assert steps == sorted(steps)
    assert (events[-1].status.step, events[-1].status.steps, events[-1].status.progress) == (8, 8, 1.0)
    shown = [event for event in events if event.kind == "preview"]
    assert sorted(event.index for event in shown) == [0, 0, 1, 1]
    assert {event.image.size for event in shown} == {(4, 4)}
    assert studio.job(job.id) is job
    result = done(job)
    assert [each.seed for each in result.parameters] == [job.settings.seed, job.settings.seed + 1]
    assert set(result.timings) == {"encode", "denoise", "decode", "total"}


def test_a_deadline(studio: Studio) -> None:
    with pytest.raises(DeadlineError, match="not done in the time"):
        done(studio.submit(Order(Request("a", **LONG), deadline=0.2)))
    assert studio.load().lanes == {}


def test_bad_orders(studio: Studio) -> None:
    with pytest.raises(UnknownModelError, match="there is no model 'sd' here"):
        studio.submit(Order(Request("a"), model="sd"))
    with pytest.raises(RequestError, match="not a multiple"):
        studio.submit(Order(Request("a", height=100)))
    with pytest.raises(RequestError, match="clip_skip is 90"):  # which only the loaded model knows
        done(studio.submit(Order(Request("a", clip_skip=90, **SMALL))))
    assert studio.models()[0].loaded
    assert studio.model("shapes").manifest.name == "shapes"


@pytest.mark.parametrize("where", ["painter.Painter.begin", "pipeline.Pipeline.finish"])
def test_a_picture_that_fails(studio: Studio, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Takes no other one with it, and the lanes are free."""

    def fail(*_: object, **__: object) -> None:
        raise BackendError("no power")

    with monkeypatch.context() as patch:
        patch.setattr(f"allaprima.runtime.{where}", fail)
        with pytest.raises(BackendError, match="no power"):
            done(studio.submit(Order(Request("a", num_inference_steps=1, **SMALL))))
    assert studio.load().lanes == {}
    assert len(done(studio.submit(Order(Request("a", num_inference_steps=1, **SMALL)))).images) == 1


def test_an_exception_that_nobody_thought_of(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("at /a/secret/path")

    with monkeypatch.context() as patch:
        patch.setattr("allaprima.runtime.painter.Painter.begin", fail)
        with pytest.raises(BackendError, match=r"could not be painted \(ZeroDivisionError\)"):
            done(studio.submit(Order(Request("a", num_inference_steps=1, **SMALL))))
    assert studio.ready
    assert len(done(studio.submit(Order(Request("a", num_inference_steps=1, **SMALL)))).images) == 1


def test_a_step_that_fails(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("allaprima.runtime.stages.Denoiser.step", fail)
        with pytest.raises(BackendError, match="not enough memory"):
            done(studio.submit(Order(Request("a", num_inference_steps=1, **SMALL))))
    assert len(done(studio.submit(Order(Request("a", num_inference_steps=1, **SMALL)))).images) == 1


def test_the_end() -> None:
    """What runs is finished, what waits is sent away, nothing new is taken; then the thread is gone."""
    studio = Studio(["shapes"], opens, lanes=1, warm=[(32, 32)])
    assert not studio.ready
    studio.start()
    assert studio.wait_ready(60)
    running = studio.submit(Order(Request("a", num_inference_steps=20, **SMALL)))
    until(lambda: running.status.step > 0)
    waiting = studio.submit(Order(Request("a", **SMALL)))
    studio.close(60)
    assert running.status.state == "done"
    assert isinstance(waiting.failure, DrainingError)
    assert not studio.ready
    with pytest.raises(DrainingError):
        studio.submit(Order(Request("a")))
    assert not vars(studio)["_thread"].is_alive()


def test_an_end_without_patience() -> None:
    studio = Studio(["shapes"], opens, lanes=1, warm=[(32, 32)])
    studio.start()
    assert studio.wait_ready(60)
    running = studio.submit(Order(Request("a", **LONG)))
    until(lambda: running.status.step > 0)
    studio.close(0.05)
    assert isinstance(running.failure, DrainingError)


def test_a_model_that_cannot_be_loaded() -> None:
    def broken(folder: Path, limit: int | None) -> Pipeline:
        raise BackendError("no such device")

    studio = Studio(["shapes"], broken)
    studio.start()
    assert not studio.wait_ready(60)
    assert str(studio.failure) == "no such device"
    with pytest.raises(DrainingError, match="can no longer paint"):
        studio.submit(Order(Request("a")))
    studio.close(1)
