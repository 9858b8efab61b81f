"""Models that come while others are painted with, and pictures whose preparation takes a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from allaprima.bundle import BackendError, RequestError, builtin_bundle
from allaprima.runtime import Pipeline, Request
from allaprima.serve import loader
from allaprima.serve.errors import CancelledError
from allaprima.serve.jobs import Order
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
