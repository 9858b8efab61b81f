"""What Prometheus reads at /metrics. No prompt is a label, and no label has endlessly many values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from allaprima.bundle import VERSION
from allaprima.serve.jobs import Job

if TYPE_CHECKING:
    from allaprima.serve.studio import Load

_STEP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_STAGE_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_MOST_SIZES = 32


class Metrics:
    """Counts; it is the watch of a studio, and each has a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._sizes: set[str] = set()
        self._count()
        self._time()

    def _count(self) -> None:
        registry = self._registry
        self._images = Counter(
            "allaprima_images", "Pictures of jobs that are done", ["model"], registry=registry
        )
        self._jobs = Counter(
            "allaprima_jobs",
            "Jobs that ended, by how: done, failed or cancelled",
            ["model", "state"],
            registry=registry,
        )
        self._rejected = Counter(
            "allaprima_rejected", "Requests that were turned down", ["reason"], registry=registry
        )
        self._requests = Counter(
            "allaprima_requests", "Requests over HTTP", ["method", "route", "status"], registry=registry
        )
        version = Gauge("allaprima_version_info", "The version, always 1", ["version"], registry=registry)
        version.labels(VERSION).set(1)

    def _time(self) -> None:
        registry = self._registry
        self._steps = Histogram(
            "allaprima_step_seconds",
            "One call of a denoiser, by model, size in pixels and busy lanes",
            ["model", "size", "lanes"],
            buckets=_STEP_SECONDS,
            registry=registry,
        )
        self._stages = Histogram(
            "allaprima_stage_seconds",
            "Stages but denoising",
            ["model", "stage"],
            buckets=_STAGE_SECONDS,
            registry=registry,
        )
        self._files = Histogram(
            "allaprima_file_seconds",
            "Making a file of a picture",
            ["format"],
            buckets=_STAGE_SECONDS,
            registry=registry,
        )
        self._seconds = Histogram(
            "allaprima_request_seconds",
            "From a request over HTTP to the end of its answer",
            ["route"],
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )

    def follow(self, load: Callable[[], Load]) -> None:
        """Ask for the load of a studio whenever somebody reads the metrics."""
        self._registry.register(_LoadCollector(load))

    def stepped(self, model: str, height: int, width: int, lanes: int, seconds: float) -> None:
        """See Watch."""
        self._steps.labels(model, self._size(height, width), str(lanes)).observe(seconds)

    def staged(self, model: str, stage: str, seconds: float) -> None:
        """See Watch."""
        self._stages.labels(model, stage).observe(seconds)

    def ended(self, job: Job) -> None:
        """See Watch."""
        self._jobs.labels(job.model, job.status.state).inc()
        if job.result is not None:
            self._images.labels(job.model).inc(len(job.result.images))

    def filed(self, kind: str, seconds: float) -> None:
        """A picture was made into a file."""
        self._files.labels(kind).observe(seconds)

    def rejected(self, reason: str) -> None:
        """A request was turned down; `reason` is the code of a Failure."""
        self._rejected.labels(reason).inc()

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered. `route` is its pattern."""
        known = method if method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH") else "other"
        self._requests.labels(known, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """In the text format of Prometheus."""
        return generate_latest(self._registry)

    def _size(self, height: int, width: int) -> str:
        """The label; clients choose sizes, so beyond so many all others are one."""
        size = f"{width}x{height}"
        if size not in self._sizes:
            if len(self._sizes) >= _MOST_SIZES:
                return "other"
            self._sizes.add(size)
        return size


class _LoadCollector(Collector):
    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        yield GaugeMetricFamily("allaprima_queued_jobs", "Jobs that wait", value=load.queued)
        yield GaugeMetricFamily("allaprima_running_jobs", "Jobs that are painted", value=load.running)
        lanes = GaugeMetricFamily("allaprima_busy_lanes", "Lanes that are busy", labels=["model", "size"])
        for (model, height, width), count in load.lanes.items():
            lanes.add_metric([model, f"{width}x{height}"], count)
        yield lanes
