"""A studio that paints in one colour, and can be told to hold, to fail and to be busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from allaprima.bundle import VERSION, Manifest, open_bundle, resolve
from allaprima.runtime import Parameters, Result
from allaprima.serve.errors import BusyError, CancelledError, DrainingError, UnknownModelError
from allaprima.serve.jobs import Job, Order
from allaprima.serve.limits import Limits, check_limits
from allaprima.serve.studio import Load, Model

SHAPES: Manifest = open_bundle(resolve("shapes")).manifest


class FakeStudio:
    """As Studio, with a thread that paints the jobs one after the other.

    `hold` makes it wait before a step, until `go` (or the job is cancelled); `fails` is what the next
    jobs fail with; `busy` is what orders are refused with; `seconds` is what a step takes.
    """

    def __init__(self, names: Sequence[str] = ("shapes",), limits: Limits | None = None) -> None:
        self.limits = Limits() if limits is None else limits
        self.names = tuple(names)
        self.fails: Exception | None = None
        self.busy: BusyError | None = None
        self.seconds = 0.0
        self.failure: Exception | None = None
        self.ready = False
        self.draining = False
        self.asked: list[Order] = []
        self._changed = threading.Condition()
        self._held_after: int | None = None
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._ended: dict[str, Job] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def hold(self, after: int = 0) -> None:
        """Begin no step of a job but its first `after`."""
        with self._changed:
            self._held_after = after
            self._changed.notify_all()

    def go(self) -> None:
        """Go on."""
        with self._changed:
            self._held_after = None
            self._changed.notify_all()

    def start(self) -> None:
        self._thread.start()
        self.ready = True

    def models(self) -> tuple[Model, ...]:
        return tuple(self.model(name) for name in self.names)

    def model(self, name: str | None) -> Model:
        if name is not None and name not in self.names:
            raise UnknownModelError(f"there is no model '{name}' here: choose from {', '.join(self.names)}")
        chosen = self.names[0] if name is None else name
        return Model(chosen, replace(SHAPES, name=chosen), True)

    def submit(self, order: Order) -> Job:
        model = self.model(order.model)
        settings = order.request.check(model.manifest)
        check_limits(self.limits, settings)
        with self._changed:
            self.asked.append(order)
            if self.draining:
                raise DrainingError("the server is stopping: send it again to another one, or later")
            if self.busy is not None:
                raise self.busy
            job = Job(order, model.name, settings)
            job.on_cancel(self._wake)
            self._waiting.append(job)
            job.update(position=len(self._waiting))
            self._changed.notify_all()
        return job

    def job(self, id: str) -> Job | None:
        found = (job for job in self.jobs() if job.id == id)
        return next(found, self._ended.get(id))

    def jobs(self) -> tuple[Job, ...]:
        return (*self._running, *self._waiting)

    def load(self) -> Load:
        lanes = {("shapes", 128, 128): len(self._running)}
        return Load(len(self._waiting), len(self._running), lanes)

    def drain(self) -> None:
        with self._changed:
            self.draining, self.ready = True, False
            waiting = tuple(self._waiting)
        for job in waiting:
            self._end(job, DrainingError("the server stopped before the picture was begun: send it again"))

    def close(self, timeout: float | None = None) -> None:
        self.drain()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)

    def _begins(self, step: int) -> bool:
        return self._held_after is None or step <= self._held_after

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _end(self, job: Job, outcome: Result | Exception) -> None:
        with self._changed:
            for jobs in (self._waiting, self._running):
                if job in jobs:
                    jobs.remove(job)
            self._ended[job.id] = job
        job.finish(outcome)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if not self._waiting:
                    return
                job = self._waiting[0]
                self._waiting.remove(job)
                self._running.append(job)
            try:
                outcome: Result | Exception = self._paint(job)
            except Exception as error:
                outcome = error
            self._end(job, outcome)

    def _paint(self, job: Job) -> Result:
        made = job.settings
        steps = made.num_inference_steps
        total = steps * made.num_images
        job.update(state="running", position=None, steps=total)
        for step in range(1, steps + 1):
            with self._changed:
                self._changed.wait_for(lambda step=step: self._begins(step) or job.cancelled or self._closed)
            if self._closed:
                raise DrainingError("the server stopped before the picture was done: send it again")
            if job.cancelled:
                raise CancelledError("the job was cancelled")
            if self.fails is not None:
                raise self.fails
            time.sleep(self.seconds)
            job.update(step=step * made.num_images)
            every = job.order.preview_every
            if every and step % every == 0:
                for index in range(made.num_images):
                    size = made.width // 8, made.height // 8
                    job.show(Image.new("RGB", size, (step % 256, index, 0)), index)
        size = made.width, made.height
        images = tuple(
            Image.new("RGB", size, (made.seed % 256, index, 99)) for index in range(made.num_images)
        )
        return Result(images, tuple(_parameters(job, index) for index in range(made.num_images)), {}, ())


def _parameters(job: Job, index: int) -> Parameters:
    made = job.settings
    return Parameters(
        prompt=made.prompt,
        negative_prompt=made.negative_prompt,
        num_inference_steps=made.num_inference_steps,
        guidance_scale=made.guidance_scale,
        sampler=made.sampler or "ddim",
        seed=made.seed + index,
        height=made.height,
        width=made.width,
        eta=made.eta,
        bundle=job.model,
        backend="fake",
        precision="fp32",
        version=VERSION,
        strength=made.strength,
    )
