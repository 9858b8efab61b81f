"""The studio: the models, the queue, and the one thread that paints."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allaprima.bundle import AllaprimaError, Manifest
from allaprima.serve.desk import Desk
from allaprima.serve.errors import DrainingError
from allaprima.serve.jobs import Job, Order
from allaprima.serve.limits import Limits
from allaprima.serve.loader import Loader
from allaprima.serve.shelf import Opens, Shelf, Shelved
from allaprima.serve.watch import NOBODY, Watch
from allaprima.serve.workshop import Workshop

LIMITS = Limits()


@dataclass(frozen=True)
class Model:
    """A model that is served: its name, its manifest, and whether its weights are loaded now."""

    name: str
    manifest: Manifest
    loaded: bool


@dataclass(frozen=True)
class Load:
    """How busy a studio is: jobs that wait and run, and busy lanes by model, height and width."""

    queued: int
    running: int
    lanes: dict[tuple[str, int, int], int]


class Studio:
    """Paints what is ordered, on a thread of its own. Every method may be called from any thread."""

    def __init__(
        self,
        bundles: Sequence[str | Path],
        opens: Opens,
        *,
        limits: Limits = LIMITS,
        memory_limit: int | None = None,
        lanes: int | None = None,
        warm: Sequence[tuple[int, int]] | None = None,
        joins: bool = True,
        watch: Watch = NOBODY,
    ) -> None:
        """Open the manifests of bundles, of which the first is the default model.

        `opens` opens a pipeline within a memory limit; `memory_limit` in bytes is for all models together.
        `lanes` is how many pictures of one size are painted together; None measures it for the sizes (height,
        width) in `warm`, of the default model, before it is ready. None for these is the model's own size, as
        of the other models, which are loaded and measured when they are first asked for, while pictures of
        others go on.
        `joins` False lets no picture join others that took a step: batches as other servers make them, to
        compare with.
        Raises BundleError.
        """
        self._shelf = Shelf(bundles, opens, memory_limit)
        self._desk = Desk(limits, watch)
        self._shelf.loaded = self._desk.wake
        loader = Loader(self._shelf, lanes=lanes, warm=warm)
        self._workshop = Workshop(self._shelf, self._desk, loader, watch, joins=joins)
        self._limits = limits
        self._thread = threading.Thread(target=self._work, name="allaprima-studio", daemon=True)
        self._ready = threading.Event()
        self._failure: Exception | None = None

    def start(self) -> None:
        """Begin to load, warm up and paint; `ready` is true when that is done."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether it is warmed up, can paint and is not draining."""
        return self._ready.is_set() and self._failure is None and not self._desk.draining

    @property
    def failure(self) -> Exception | None:
        """Why it can no longer paint; None if it can."""
        return self._failure

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until it is warmed up or has failed; whether it is ready."""
        self._ready.wait(timeout)
        return self.ready

    def models(self) -> tuple[Model, ...]:
        """The default one first."""
        return tuple(_shown(each) for each in self._shelf.models)

    def model(self, name: str | None) -> Model:
        """By name, None is the default. Raises UnknownModelError."""
        return _shown(self._shelf.find(name))

    @property
    def limits(self) -> Limits:
        """What may be asked for."""
        return self._limits

    def submit(self, order: Order) -> Job:
        """Check an order and put it in the queue.

        Raises RequestError (OverLimitError and UnknownModelError are of that kind), BusyError, or
        DrainingError.
        """
        model = self._shelf.find(order.model)
        if self._failure is not None:
            raise DrainingError("the server can no longer paint: see its log, and start it again")
        return self._desk.accept(order, model.name, model.bundle.manifest)

    def job(self, id: str) -> Job | None:
        """A job that waits, runs, or ended not long ago."""
        return self._desk.find(id)

    def jobs(self) -> tuple[Job, ...]:
        """Those that wait or run, the oldest first."""
        return self._desk.open_jobs()

    def load(self) -> Load:
        """How busy it is."""
        states = [job.status.state for job in self._desk.open_jobs()]
        return Load(states.count("queued"), states.count("running"), self._workshop.lanes_taken())

    def drain(self) -> None:
        """Take nothing new and fail what waits with DrainingError; what runs is finished."""
        self._desk.drain()

    def close(self, timeout: float | None = None) -> None:
        """Drain, wait up to `timeout` seconds for what runs, then stop and let go of the models."""
        until = None if timeout is None else time.monotonic() + timeout
        self.drain()
        self._desk.stop(timeout)
        if self._thread.is_alive():
            self._thread.join(None if until is None else max(0.0, until - time.monotonic()))
        self._desk.fail_all(DrainingError("the server stopped before the picture was done: send it again"))

    def _work(self) -> None:
        try:
            worked = True
            while self._desk.go_on(worked):
                worked = self._workshop.turn()
                if self._workshop.warm:
                    self._ready.set()
        except BaseException as error:  # libraries in Rust panic with what is no Exception
            self._failure = error if isinstance(error, Exception) else RuntimeError(repr(error))
            reason = error if isinstance(error, AllaprimaError) else DrainingError("the server failed")
            self._desk.fail_all(reason)
        finally:
            self._ready.set()
            self._shelf.close()


def _shown(model: Shelved) -> Model:
    return Model(model.name, model.bundle.manifest, model.pipeline is not None)
