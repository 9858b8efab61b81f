"""The queue: what is taken, what is refused, and what is remembered."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from allaprima.bundle import Manifest, RequestError, open_bundle, resolve
from allaprima.runtime import Request, Result
from allaprima.serve.desk import Desk
from allaprima.serve.errors import BusyError, CancelledError, DeadlineError, DrainingError, OverLimitError
from allaprima.serve.jobs import MOST_EVENTS, Job, Order
from allaprima.serve.limits import Limits
from allaprima.serve.watch import Nobody

LIMITS = Limits(queue=4, kept=2)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return open_bundle(resolve("shapes")).manifest


@pytest.fixture
def desk() -> Desk:
    return Desk(LIMITS)


Later = Callable[[float], None]


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Later:
    """later(seconds): the desk's clocks are so much ahead from now on."""

    def shift(seconds: float) -> None:
        ahead = SimpleNamespace(
            time=lambda: time.time() + seconds, monotonic=lambda: time.monotonic() + seconds
        )
        monkeypatch.setattr("allaprima.serve.desk.time", ahead)

    return shift


@pytest.fixture
def order(desk: Desk, manifest: Manifest) -> Any:
    def submit(num_images: int = 1, *, deadline: float | None = None, **fields: Any) -> Job:
        request = Request("a red circle", num_images=num_images, **fields)
        return desk.accept(Order(request, deadline=deadline), "shapes", manifest)

    return submit


def result(images: int = 1) -> Result:
    return Result((Image.new("RGB", (8, 8)),) * images, (), {"total": 1.0}, ())


def test_places_in_the_queue(desk: Desk, order: Any) -> None:
    jobs = [order() for _ in range(3)]
    assert [job.status.position for job in jobs] == [1, 2, 3]
    assert desk.open_jobs() == tuple(jobs)
    assert desk.begin(jobs[1])
    assert [job.status.position for job in jobs] == [1, None, 2]
    assert [job.status.state for job in jobs] == ["queued", "running", "queued"]
    assert not desk.begin(jobs[1])
    desk.end(jobs[0], CancelledError("stop"))
    assert (jobs[2].status.position, jobs[0].status.state) == (1, "cancelled")


def test_a_full_queue(desk: Desk, order: Any) -> None:
    order(3)
    with pytest.raises(BusyError, match=r"the queue is full \(3 of at most 4 pictures wait\)") as caught:
        order(2)
    assert caught.value.retry_after == 3
    order(1)
    for _ in range(50):
        desk.painted(10.0)
    with pytest.raises(BusyError) as caught:
        order()
    assert caught.value.retry_after > 30
    assert len(desk.queue) == 2


def test_pictures_that_wait_take_memory(manifest: Manifest) -> None:
    """And no longer than they are needed: whoever ended keeps none."""
    desk = Desk(replace(LIMITS, queue_bytes=3 * 64 * 64 * 3))
    picture = Image.new("RGB", (64, 64))

    def submit() -> Job:
        request = Request("a", image=picture, mask=picture.convert("L"), height=64, width=64)
        return desk.accept(Order(request), "shapes", manifest)

    first, _ = submit(), submit()
    with pytest.raises(BusyError, match="the pictures that 2 waiting jobs begin with take up the memory"):
        submit()
    assert first.order.request.image is None
    desk.end(first, CancelledError("stop"))
    assert (first.input_bytes, first.settings.picture, first.settings.mask) == (0, None, None)
    submit()


@pytest.mark.parametrize(
    ("limits", "fields", "message"),
    [
        (Limits(queue=2), {"num_images": 3}, "pictures waiting is 3, more than this server allows"),
        (
            Limits(work=32 * 64 * 64),
            {"height": 64, "width": 64, "num_inference_steps": 20, "sampler": "heun"},
            "pictures x steps x pixels is 159744",
        ),
        (
            Limits(images=2),
            {"num_images": 3},
            "num_images is 3, more than this server allows",
        ),
        (Limits(steps=20), {"num_inference_steps": 21}, "num_inference_steps is 21"),
        (Limits(pixels=64 * 64), {"height": 128, "width": 64}, "height x width is 8192"),
        (Limits(prompt_bytes=8), {}, "a prompt's bytes is 12"),
        (Limits(prompt_bytes=12), {"negative_prompt": "é" * 7}, "a prompt's bytes is 14"),
        (
            Limits(work=16 * 64 * 64),
            {"height": 64, "width": 64, "num_inference_steps": 9, "num_images": 2},
            "x pix",
        ),
    ],
)
def test_limits(manifest: Manifest, limits: Limits, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OverLimitError, match=message):
        Desk(limits).accept(Order(Request("a red circle", **fields)), "shapes", manifest)


def test_bad_orders(desk: Desk, order: Any, manifest: Manifest) -> None:
    with pytest.raises(RequestError, match="height 100 is not a multiple of 32"):
        order(height=100)
    for deadline in (0, -1.0, 1e9):
        with pytest.raises(OverLimitError, match=r"deadline is .* give more than 0, and at most 3600"):
            order(deadline=deadline)
    with pytest.raises(RequestError, match="there is no sampler 'best'"):
        order(sampler="best")
    with pytest.raises(RequestError, match="preview_every"):
        desk.accept(Order(Request("a"), preview_every=-1), "shapes", manifest)
    unseen = replace(manifest, preview=None)
    with pytest.raises(RequestError, match="says nothing of how its latents look"):
        desk.accept(Order(Request("a"), preview_every=1), "shapes", unseen)
    assert desk.open_jobs() == ()


def test_random_seeds_are_drawn_at_the_door(order: Any) -> None:
    assert order().settings.seed != order().settings.seed


def test_cancelled_and_late(desk: Desk, order: Any, later: Later) -> None:
    one, late, other = order(), order(deadline=60), order()
    assert desk.interrupted() == ()
    one.cancel()
    later(61)
    found = desk.interrupted()
    assert [(job, type(reason)) for job, reason in found] == [(one, CancelledError), (late, DeadlineError)]
    for job, reason in found:
        desk.end(job, reason)
    assert desk.open_jobs() == (other,)
    assert (late.status.state, one.status.state) == ("failed", "cancelled")


def test_the_thread_wakes(desk: Desk, order: Any) -> None:
    """By an order, by a cancellation, by a deadline and by the end."""
    woken: list[bool] = []
    waiting = threading.Event()

    def go_on() -> None:
        waiting.set()
        woken.append(desk.go_on(False))

    def after(change: Any) -> None:
        waiting.clear()
        thread = threading.Thread(target=go_on)
        thread.start()
        waiting.wait(5)
        change()
        thread.join(5)
        assert not thread.is_alive()

    jobs: list[Job] = []
    after(lambda: jobs.append(order()))
    after(lambda: jobs[0].cancel())
    desk.end(jobs[0], CancelledError(""))
    desk.go_on(True)
    late = order(deadline=0.05)
    desk.go_on(True)
    after(lambda: None)
    desk.end(late, CancelledError(""))  # or it would wake the thread before the end does
    desk.go_on(True)
    after(lambda: desk.stop(0))
    assert woken == [True, True, True, False]


def test_nothing_is_missed_between_two_looks(desk: Desk, order: Any) -> None:
    """What comes while the thread is at work is found without waiting."""
    assert desk.go_on(True)
    order()
    started = time.monotonic()
    assert desk.go_on(False)
    assert time.monotonic() - started < 5


def test_drained(desk: Desk, order: Any) -> None:
    running, waiting = order(), order()
    desk.begin(running)
    desk.drain()
    assert isinstance(waiting.failure, DrainingError)
    assert running.status.state == "running"
    with pytest.raises(DrainingError, match="the server is stopping"):
        order()
    desk.end(running, result())
    assert running.status.state == "done"
    desk.stop(None)
    assert not desk.go_on(True)


def test_ended_jobs_are_forgotten_in_time(manifest: Manifest, later: Later) -> None:
    desk = Desk(replace(LIMITS, kept_seconds=60))
    jobs = [desk.accept(Order(Request("a")), "shapes", manifest) for _ in range(3)]
    for job in jobs:
        desk.begin(job)
        desk.end(job, result())
    assert [desk.find(job.id) for job in jobs] == [None, jobs[1], jobs[2]]
    later(61)
    assert desk.find(jobs[2].id) is None
    assert desk.find("nobody") is None


def test_large_pictures_are_forgotten_first(manifest: Manifest) -> None:
    desk = Desk(replace(LIMITS, kept_bytes=8 * 8 * 3 * 3))
    jobs = [desk.accept(Order(Request("a", num_images=2)), "shapes", manifest) for _ in range(2)]
    for job in jobs:
        desk.begin(job)
        desk.end(job, result(2))
    assert [desk.find(job.id) for job in jobs] == [None, jobs[1]]


def test_whoever_just_ended_is_found(manifest: Manifest) -> None:
    """However large its pictures are."""
    desk = Desk(replace(LIMITS, kept_bytes=1))
    job = desk.accept(Order(Request("a")), "shapes", manifest)
    desk.begin(job)
    desk.end(job, result())
    assert desk.find(job.id) is job


def test_every_end_is_told_once(manifest: Manifest) -> None:
    class Watching(Nobody):
        def ended(self, job: Job) -> None:
            told.append(job)

    told: list[Job] = []
    desk = Desk(LIMITS, Watching())
    one, other = (desk.accept(Order(Request("a")), "shapes", manifest) for _ in range(2))
    desk.begin(one)
    desk.drain()
    desk.end(one, result())
    desk.end(one, CancelledError("too late"))
    assert told == [other, one]


def test_events(desk: Desk, order: Any) -> None:
    """Told from any thread, in order, to everybody who listens; whoever comes late is told how it ended."""
    job = order()

    async def follow() -> list[tuple[str, str]]:
        return [(event.kind, event.status.state) async for event in job.events()]

    async def both() -> Any:
        tasks = [asyncio.create_task(follow()) for _ in range(2)]
        await asyncio.sleep(0.01)
        abandoned = job.events()
        await anext(abandoned)
        await abandoned.aclose()

        def work() -> None:
            desk.begin(job)
            job.show(Image.new("RGB", (4, 4)), 0)
            desk.end(job, result())
            job.show(Image.new("RGB", (4, 4)), 0)

        await asyncio.to_thread(work)
        return await asyncio.gather(*tasks, follow(), job.wait())

    first, second, late, made = asyncio.run(both())
    assert first == [("status", "queued"), ("status", "running"), ("preview", "running"), ("ended", "done")]
    assert second == first
    assert late == [("ended", "done")]
    assert made is job.result
    assert job.status.progress == 1.0


def test_who_listens_slowly_misses_what_lies_far_back(desk: Desk, order: Any) -> None:
    job = order()

    async def follow() -> list[Any]:
        events = job.events()
        first = await anext(events)
        desk.begin(job)
        for step in range(1000):
            job.update(step=step)
        desk.end(job, result())
        return [first, *[event async for event in events]]

    seen = asyncio.run(follow())
    assert len(seen) == 1 + MOST_EVENTS
    assert (seen[-2].status.step, seen[-1].kind) == (999, "ended")


def test_the_first_outcome_counts(desk: Desk, order: Any) -> None:
    job = order()
    desk.end(job, CancelledError("stop"))
    desk.end(job, result())
    job.update(step=3)
    assert (job.status.state, job.result, job.status.step) == ("cancelled", None, 0)
    with pytest.raises(CancelledError):
        asyncio.run(job.wait())


def test_a_listener_whose_loop_is_gone(desk: Desk, order: Any) -> None:
    job = order()

    async def look() -> None:
        await anext(job.events())

    loop = asyncio.new_event_loop()
    loop.run_until_complete(look())
    loop.close()
    desk.end(job, result())
    assert job.status.state == "done"
