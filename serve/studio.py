"""The studio: the models, the queue, and the one thread that paints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allaprima.bundle import Manifest
from allaprima.serve.jobs import Job, Order
from allaprima.serve.limits import Limits


@dataclass(frozen=True)
class Model:
    """A model that is served: its name, its manifest, and whether its weights are loaded now."""

    name: str
    manifest: Manifest
    loaded: bool


@dataclass(frozen=True)
class Load:
    """How busy a studio is: jobs that wait and run, lanes that are busy (by model and size)."""

    queued: int
    running: int
    lanes: dict[tuple[str, int, int], int]


class Studio:
    """Paints what is ordered, on a thread of its own. Every method may be called from any thread."""

    def __init__(
        self,
        bundles: Sequence[str | Path],
        *,
        limits: Limits = Limits(),
        backend: str = "auto",
        precision: str | None = None,
        threads: int | None = None,
        memory_limit: int | None = None,
        warm: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Open the manifests of bundles; the first is the default model. Raises BundleError."""

    def start(self) -> None:
        """Begin to load, warm up and paint. `ready` is true from then on when that is done."""

    @property
    def ready(self) -> bool:
        """Whether it is warmed up, and not draining."""

    @property
    def failure(self) -> Exception | None:
        """Why it can no longer paint; None if it can."""

    def models(self) -> tuple[Model, ...]:
        """The default one first."""

    def model(self, name: str | None) -> Model:
        """By name, None is the default. Raises UnknownModel."""

    def submit(self, order: Order) -> Job:
        """Check an order and put it in the queue.

        Raises RequestError (OverLimit and UnknownModel are of that kind), Busy, or Draining.
        """

    def job(self, id: str) -> Job | None:
        """A job that waits, runs, or ended not long ago."""

    def jobs(self) -> tuple[Job, ...]:
        """Those that wait or run, the oldest first."""

    def load(self) -> Load:
        """How busy it is."""

    def drain(self) -> None:
        """Take nothing new and fail what waits with Draining; what runs is finished."""

    def close(self, timeout: float | None = None) -> None:
        """Drain, wait up to `timeout` seconds for what runs, then stop the thread and let go of models."""
