"""The desk: takes orders within limits, keeps the queue, and remembers what ended."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque

from allaprima.bundle import AllaprimaError, Manifest
from allaprima.runtime import Result
from allaprima.runtime.painting import plan_table
from allaprima.runtime.preview import check_preview
from allaprima.serve.errors import BusyError, CancelledError, DeadlineError, DrainingError, OverLimitError
from allaprima.serve.jobs import Job, Order
from allaprima.serve.limits import Limits, check_limits
from allaprima.serve.watch import NOBODY, Watch


class Desk:
    """Between those who order, on any thread, and the one thread that paints."""

    def __init__(self, limits: Limits, watch: Watch = NOBODY) -> None:
        self._limits, self._watch = limits, watch
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._due: dict[str, float] = {}
        self._pace = 1.0  # seconds of the device for one picture, lately
        self._version = self._seen = 0
        self._stopped = False
        self.draining = False

    # For those who order.

    def accept(self, order: Order, model: str, manifest: Manifest) -> Job:
        """Put an order in the queue, resolved as far as it can be. See Studio.submit."""
        settings = order.request.check(manifest)
        check_preview(order.preview_every, manifest, heard=True)
        check_limits(self._limits, settings)  # before a table of so many steps is made
        check_limits(self._limits, settings, calls=len(plan_table(manifest, settings).timesteps))
        seconds = self._limits.deadline if order.deadline is None else order.deadline
        if not 0 < seconds <= self._limits.most_deadline:
            raise OverLimitError(
                f"deadline is {seconds:g} s: give more than 0, and at most {self._limits.most_deadline:g}"
            )
        job = Job(order.without_pictures(), model, settings)
        with self._changed:
            if self.draining:
                raise DrainingError("the server is stopping: send it again to another one, or later")
            waiting = sum(each.settings.num_images for each in self._queue)
            if waiting + settings.num_images > self._limits.queue:
                raise BusyError(
                    f"the queue is full ({waiting} of at most {self._limits.queue} pictures wait): try later",
                    retry_after=max(1, round(waiting * self._pace)),
                )
            held = sum(each.input_bytes for each in self._queue)
            if held and held + job.input_bytes > self._limits.queue_bytes:
                raise BusyError(
                    f"the pictures that {len(self._queue)} waiting jobs begin with take up the "
                    "memory: try later",
                    retry_after=max(1, round(self._pace)),
                )
            job.on_cancel(self.wake)
            self._due[job.id] = time.monotonic() + seconds
            self._queue.append(job)
            self._number()
            self._signal()
        return job

    def find(self, id: str) -> Job | None:
        """A job that waits, runs, or ended not long ago."""
        with self._changed:
            self._forget()
            return next((job for job in (*self._running, *self._queue) if job.id == id), self._ended.get(id))

    def open_jobs(self) -> tuple[Job, ...]:
        """Those that run or wait, the oldest first."""
        with self._changed:
            return (*self._running, *self._queue)

    def drain(self) -> None:
        """Take nothing new, and end what waits."""
        with self._changed:
            self.draining = True
            waiting = tuple(self._queue)
        for job in waiting:
            self.end(job, DrainingError("the server stopped before the picture was begun: send it again"))
        self.wake()

    def stop(self, timeout: float | None) -> None:
        """Let `go_on` return False once nothing runs, or time is up."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running, timeout)
            self._stopped = True
            self._signal()

    def wake(self) -> None:
        """Let the thread that paints look again; from any thread."""
        with self._changed:
            self._signal()

    # For the thread that paints.

    @property
    def queue(self) -> tuple[Job, ...]:
        """Those that wait, the oldest first."""
        with self._changed:
            return tuple(self._queue)

    def go_on(self, worked: bool) -> bool:
        """Whether to go on; if nothing could be done, after something has changed."""
        with self._changed:
            if not worked:
                self._changed.wait_for(lambda: self._stopped or self._version != self._seen, self._patience())
            self._seen = self._version
            return not self._stopped

    def begin(self, job: Job) -> bool:
        """A job's first picture is to be begun; False if it no longer waits."""
        with self._changed:
            if job not in self._queue:
                return False
            self._queue.remove(job)
            self._running.append(job)
            self._number()
        job.update(state="running", position=None, started=time.time())
        return True

    def interrupted(self) -> tuple[tuple[Job, AllaprimaError], ...]:
        """Jobs that wait or run but were cancelled or are too late, with what to end them with."""
        now = time.monotonic()
        found: list[tuple[Job, AllaprimaError]] = []
        for job in self.open_jobs():
            if job.cancelled:
                found.append((job, CancelledError("the job was cancelled")))
            elif now > self._due.get(job.id, now):
                found.append((job, DeadlineError("the picture was not done in the time that was given")))
        return tuple(found)

    def end(self, job: Job, outcome: Result | Exception) -> None:
        """A job is over. The first outcome counts."""
        if not job.finish(outcome):
            return
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
                self._number()
            elif job in self._running:
                self._running.remove(job)
            self._due.pop(job.id, None)
            self._ended[job.id] = job
            self._forget()
            self._changed.notify_all()
        self._watch.ended(job)

    def painted(self, seconds: float) -> None:
        """A picture took so many seconds of the device; what clients are told to wait goes by it."""
        self._pace += 0.1 * (seconds - self._pace)

    def fail_all(self, error: Exception) -> None:
        """End everything; nothing new is taken."""
        self.draining = True
        for job in self.open_jobs():
            self.end(job, error)

    def _number(self) -> None:
        for place, job in enumerate(self._queue, 1):
            if job.status.position != place:
                job.update(position=place)

    def _signal(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def _patience(self) -> float | None:
        """Seconds until the next job is too late; None if there is none."""
        if not self._due:
            return None
        return max(0.0, min(self._due.values()) - time.monotonic()) + 0.001

    def _forget(self) -> None:
        """Drop what ended long ago, and the oldest if there are too many or their pictures too large."""
        oldest = time.time() - self._limits.kept_seconds
        size = sum(_size(job) for job in self._ended.values())
        while self._ended:
            job = next(iter(self._ended.values()))
            small = size <= self._limits.kept_bytes or len(self._ended) == 1  # who just ended is asked for
            few = len(self._ended) <= self._limits.kept
            if small and few and (job.status.ended or 0.0) > oldest:
                break
            size -= _size(job)
            del self._ended[job.id]


def _size(job: Job) -> int:
    """Bytes that the pictures of a job take."""
    images = () if job.result is None else job.result.images
    return sum(image.width * image.height * len(image.getbands()) for image in images)
