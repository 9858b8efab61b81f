"""Models that come while others are painted with, and pictures whose preparation takes a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from allaprima.bundle import BackendError, RequestError, builtin_bundle
from allaprima.runtime import Pipeline, Request
from allaprima.runtime.staging import Staging
from allaprima.serve import loader
from allaprima.serve.errors import CancelledError, DrainingError
from allaprima.serve.jobs import Order
from allaprima.serve.shelf import Shelf
from allaprima.serve.studio import Studio

from .conftest import until
from .test_studio import LONG, SMALL, done, opens

Copies = Callable[[str], Path]


class Doors:
    """Opens pipelines; those of the model "two" when it is told to, or not at all."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.fails: Exception | None = None

    def __call__(self, folder: Path, limit: int | None) -> Pipeline:
        if folder.name == "two":
            assert self.open.wait(60)
            if self.fails is not None:
                raise self.fails
        return opens(folder, limit)


@pytest.fixture
def doors() -> Doors:
    return Doors()


@pytest.fixture
def studio(copies: Copies, doors: Doors) -> Iterator[Studio]:
    """Of two models, of which the first is ready."""
    made = Studio([builtin_bundle("shapes"), copies("two")], doors, lanes=2, warm=[(32, 32)])
    made.start()
    assert made.wait_ready(60)
    yield made
    doors.open.set()
    made.close(60)


def order(model: str, **options: Any) -> Order:
    return Order(Request("a", **{"num_inference_steps": 2, **SMALL, **options}), model=model)


def test_others_go_on_while_a_model_is_loaded(studio: Studio, doors: Doors) -> None:
    """Those that came later too; and a job can be cancelled while its model is on its way."""
    waiting, given_up = studio.submit(order("two")), studio.submit(order("two"))
    assert len(done(studio.submit(order("shapes"))).images) == 1
    given_up.cancel()
    until(lambda: given_up.status.state == "cancelled")
    assert [model.loaded for model in studio.models()] == [True, False]
    assert (waiting.status.state, waiting.status.position) == ("queued", 1)
    doors.open.set()
    assert len(done(waiting).images) == 1
    assert [model.loaded for model in studio.models()] == [True, True]


def test_a_model_that_cannot_be_loaded_fails_its_jobs_alone(studio: Studio, doors: Doors) -> None:
    doors.fails = BackendError("it is broken")
    doors.open.set()
    with pytest.raises(BackendError, match="it is broken"):
        done(studio.submit(order("two")))
    doors.fails = None
    assert len(done(studio.submit(order("two"))).images) == 1


def test_others_take_steps_while_a_model_is_measured(
    studio: Studio, doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    doors.open.set()
    painted = studio.submit(Order(Request("a", **LONG)))
    until(lambda: painted.status.step > 0)
    seen: list[int] = []

    def measure(*_: object) -> Any:
        for _ in range(5):
            seen.append(painted.status.step)
            yield
        return 1

    monkeypatch.setattr(loader, "measure_lanes", measure)
    done(studio.submit(order("two")))
    assert seen == list(range(seen[0], seen[0] + 5))
    painted.cancel()


def refuse(*_: object) -> Any:
    raise RequestError("no engine was built for 128x128")
    yield


def test_a_model_without_an_engine_for_its_own_size(
    studio: Studio, doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may be there: what can be painted is."""
    doors.open.set()
    monkeypatch.setattr(loader, "measure_lanes", refuse)
    assert len(done(studio.submit(order("two"))).images) == 1


def test_a_default_model_without_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is for the sizes that it was told to be ready for."""
    monkeypatch.setattr(loader, "measure_lanes", refuse)
    for warm, ready in ((None, True), ([(32, 32)], False)):
        studio = Studio(["shapes"], opens, warm=warm)
        studio.start()
        assert studio.wait_ready(60) == ready
        assert isinstance(studio.failure, RequestError) != ready
        studio.close(60)


def test_a_measurement_that_failed_is_tried_again(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the model is loaded again: it may have been short of memory then."""
    folder, tried = copies("two"), []
    measure = loader.measure_lanes

    def fail_once(pipeline: Pipeline, *rest: Any) -> Any:
        tried.append(pipeline.bundle.manifest.name)
        if tried.count("two") == 1:
            raise BackendError("no memory")
        return (yield from measure(pipeline, *rest))

    monkeypatch.setattr(loader, "measure_lanes", fail_once)
    size = Shelf([folder], opens, None).models[0].size
    studio = Studio(["shapes", folder], opens, memory_limit=int(1.5 * size), lanes=1, warm=[(32, 32)])
    studio.start()
    try:
        assert studio.wait_ready(60)
        for name in ("two", "shapes", "two", "shapes"):
            done(studio.submit(order(name)))
        assert [model.loaded for model in studio.models()] == [True, False]
        assert tried == ["shapes", "two", "two"]
    finally:
        studio.close(60)


def test_a_model_larger_than_the_memory() -> None:
    """Its weights come and go; pictures of several sizes are painted one after the other, and none fails."""

    def limited(folder: Path, limit: int | None) -> Pipeline:
        return opens(folder, 75_000_000)

    studio = Studio(["shapes"], limited, warm=[(64, 64)])
    studio.start()
    try:
        assert studio.wait_ready(60)
        sides = (32, 64, 96, 64, 32)
        jobs = [
            studio.submit(Order(Request("a", height=side, width=side, num_inference_steps=2)))
            for side in sides
        ]
        for job in jobs:
            assert len(done(job).images) == 1
    finally:
        studio.close(60)


def test_one_more_for_whom_there_is_no_room(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes nobody with it who was there before."""
    painted = studio.submit(Order(Request("a", height=32, width=32, num_inference_steps=150)))
    until(lambda: painted.status.step > 0)
    make = Staging.make_denoiser

    def crowded(self: Staging, shape: Any, lanes: int, **options: Any) -> Any:
        if lanes == 2:
            raise BackendError("out of memory")
        return make(self, shape, lanes, **options)

    monkeypatch.setattr(Staging, "make_denoiser", crowded)
    with pytest.raises(BackendError, match="out of memory"):
        done(studio.submit(order("shapes")))
    assert len(done(painted).images) == 1


def test_the_end_before_it_is_warm(doors: Doors, copies: Copies) -> None:
    """Nobody waits for a model that nobody needs any more, and who came too early is told."""
    studio = Studio([copies("two")], doors)
    studio.start()
    early, late = studio.submit(order("two")), studio.submit(order("two"))
    late.cancel()
    until(lambda: late.status.state == "cancelled")
    begun = time.monotonic()
    studio.close(30)
    assert time.monotonic() - begun < 5
    assert isinstance(early.failure, DrainingError)
    doors.open.set()


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of 64x64 are prepared in ten parts, as with a prior."""
    prepare = Pipeline.prepare_in_parts

    def in_parts(self: Pipeline, settings: Any, **options: Any) -> Any:
        if settings.height == 64:
            for _ in range(10):
                yield
        return (yield from prepare(self, settings, **options))

    monkeypatch.setattr(Pipeline, "prepare_in_parts", in_parts)


@pytest.mark.usefixtures("slowly")
def test_others_take_steps_while_a_picture_is_prepared(studio: Studio) -> None:
    """One that is painted goes on meanwhile."""
    painted = studio.submit(Order(Request("a", **LONG)))
    until(lambda: painted.status.step > 0)
    slow = studio.submit(order("shapes", height=64, width=64))
    done(slow)
    assert painted.status.state == "running"
    assert painted.status.step >= 3
    painted.cancel()
    until(lambda: not studio.jobs())
    assert studio.load().lanes == {}


def test_a_job_that_is_cancelled_while_it_is_prepared(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place is free at once."""
    left = threading.Event()

    def endless(*_: object, **__: object) -> Any:
        try:
            while True:
                yield
        finally:
            left.set()

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "prepare_in_parts", endless)
        job = studio.submit(order("shapes"))
        until(lambda: job.status.state == "running")
        job.cancel()
        with pytest.raises(CancelledError):
            done(job)
        assert left.wait(10)
    assert len(done(studio.submit(order("shapes"))).images) == 1


def test_a_preparation_that_fails_half_way(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Any:
        yield
        raise BackendError("no power")

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "prepare_in_parts", fail)
        with pytest.raises(BackendError, match="no power"):
            done(studio.submit(order("shapes")))
    assert len(done(studio.submit(order("shapes"))).images) == 1
