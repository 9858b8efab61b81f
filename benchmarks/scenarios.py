"""MLPerf's ways of asking, by our own generator.

Single stream: the next query when the last is done. Offline: all at once. Server: queries come by themselves,
as a Poisson process, and the latency counts from their arrival. See Reddi et al., "MLPerf Inference
Benchmark" (2019).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from allaprima.benchmarks.arithmetic import percentile, poisson_arrivals
from allaprima.benchmarks.contestants import Contestant
from allaprima.benchmarks.plan import Plan, Work
from allaprima.benchmarks.turns import Say, opened
from allaprima.bundle import RequestError

SCENARIOS = ("single-stream", "offline", "server")
WITHIN = 99.0
"""Percent of a server's queries that must be done in time."""
HALVINGS = 6
"""Of the interval in which the largest rate is searched: it is found to 1/64 of the offline rate."""

Paint = Callable[[int], None]
"""Paint this many pictures at once."""


@dataclass(frozen=True)
class Traffic:
    """What scenarios are run with; `latency` in seconds, None without the server. `loadgen`: by it too."""

    scenarios: tuple[str, ...]
    queries: int
    latency: float | None
    loadgen: bool

    def __post_init__(self) -> None:
        unknown = [name for name in self.scenarios if name not in SCENARIOS]
        if unknown:
            raise RequestError(
                f"unknown scenario '{unknown[0]}': choose from latency, {', '.join(SCENARIOS)}"
            )
        if self.queries < 2:
            raise RequestError(f"queries is {self.queries}: needs at least 2")
        if "server" in self.scenarios and not (self.latency and self.latency > 0):
            raise RequestError("the scenario server needs a bound: give --latency SECONDS")


@dataclass(frozen=True)
class Latencies:
    """What a scenario came to: queries a second, and latencies in seconds. `rate` is what was asked for."""

    scenario: str
    generator: str
    queries: int
    throughput: float
    mean: float
    p50: float
    p90: float
    p99: float
    rate: float | None = None


def summarise(
    scenario: str, latencies: Sequence[float], seconds: float, rate: float | None = None
) -> Latencies:
    """Figures of a scenario in which all queries took `seconds`."""
    p50, p90, p99 = (percentile(latencies, percent) for percent in (50, 90, 99))
    mean = sum(latencies) / len(latencies)
    return Latencies(scenario, "own", len(latencies), len(latencies) / seconds, mean, p50, p90, p99, rate)


class Clock:
    """The time, and waiting for it; a test has another."""

    def now(self) -> float:
        """In seconds, from any moment on."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


def single_stream(paint: Paint, queries: int, clock: Clock) -> Latencies:
    """One picture after the other."""
    latencies = []
    for _ in range(queries):
        started = clock.now()
        paint(1)
        latencies.append(clock.now() - started)
    return summarise("single-stream", latencies, sum(latencies))


def offline(paint: Paint, queries: int, batch: int, clock: Clock) -> Latencies:
    """All queries are there at the start, and are painted in batches."""
    started = clock.now()
    latencies: list[float] = []
    while len(latencies) < queries:
        count = min(batch, queries - len(latencies))
        paint(count)
        latencies += [clock.now() - started] * count
    return summarise("offline", latencies, latencies[-1])


def serve(
    paint: Paint, arrivals: Sequence[float], batch: int, clock: Clock, bound: float | None = None
) -> list[float]:
    """Latencies of queries that arrive at these seconds; whoever waits is painted together, up to `batch`.

    With a bound it ends as soon as so many are late that `WITHIN` cannot be kept: the list is then shorter.
    """
    started, late = clock.now(), 0
    latencies: list[float] = []
    allowed = len(arrivals) * (1 - WITHIN / 100)
    while len(latencies) < len(arrivals):
        first = len(latencies)
        wait = arrivals[first] - (clock.now() - started)
        if wait > 0:
            clock.sleep(wait)
        now = clock.now() - started
        waiting = sum(1 for arrival in arrivals[first : first + batch] if arrival <= now)
        count = max(1, waiting)
        paint(count)
        done = clock.now() - started
        latencies += [done - arrival for arrival in arrivals[first : first + count]]
        late += sum(1 for value in latencies[first:] if bound is not None and value > bound)
        if late > allowed:
            break
    return latencies


def largest_rate(holds: Callable[[float], bool], most: float) -> float:
    """By bisection, the largest rate that holds, at most `most`; 0 if not even a 64th of it does."""
    low, high = 0.0, most
    if holds(most):
        return most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def server(
    paint: Paint, queries: int, batch: int, bound: float, seed: int, most: float, clock: Clock
) -> Latencies | None:
    """The largest rate of which 99 % of all queries are done within `bound` seconds; None for none."""
    best: Latencies | None = None

    def holds(rate: float) -> bool:
        nonlocal best
        arrivals = poisson_arrivals(rate, queries, seed)
        started = clock.now()
        latencies = serve(paint, arrivals, batch, clock, bound)
        if len(latencies) < queries or percentile(latencies, WITHIN) > bound:
            return False
        best = summarise("server", latencies, clock.now() - started, rate)
        return True

    largest_rate(holds, most)
    return best


@dataclass(frozen=True)
class ScenarioRun:
    """The job of one contestant in one scenario: by our own generator, then by LoadGen at the same rate.

    It is opened for the batches of that scenario alone: one that was compiled for any batch, as a server's,
    would be slower in the others too. `most` is the rate that the server's search begins at, None to measure
    it.
    """

    contestant: Contestant
    plan: Plan
    scenario: str
    asked: Traffic
    cache: Path | None
    most: float | None = None

    @property
    def works(self) -> list[Work]:
        """All that will be painted, each batch once."""
        work = self.plan.works[-1]
        counts = {"single-stream": [1], "offline": [work.batch], "server": [*range(1, work.batch + 1)]}
        return [replace(work, batch=count) for count in counts[self.scenario]]

    def warm_up(self) -> list[int]:
        """The batches to be painted before anything counts.

        A server's come in any order, and a contestant that compiles for one at a time should know that
        before: so the first comes again, as soon as there was another.
        """
        first, *others = [work.batch for work in self.works]
        return [first, *others[:1], *[first] * bool(others), *others[1:]]

    def __call__(self, say: Say) -> None:
        """Do it; every outcome is said at once."""
        from allaprima.benchmarks import loadgen

        work, settings = self.plan.works[-1], self.plan.settings
        with opened(self.contestant, settings, self.works, self.cache) as (painter, _):

            def paint(count: int) -> None:
                painter.paint(replace(work, batch=count))

            for count in self.warm_up():
                paint(count)
            found = self._own(paint, 1 if self.scenario == "single-stream" else work.batch)
            say(("scenario", found))
            if self.asked.loadgen and "error" not in found:
                say(("scenario", loadgen.repeat(paint, found, self.works[-1].batch, settings.seed)))

    def _own(self, paint: Paint, batch: int) -> dict[str, Any]:
        asked, clock = self.asked, Clock()
        if self.scenario == "single-stream":
            return asdict(single_stream(paint, asked.queries, clock))
        whole = -(-asked.queries // batch) * batch  # a smaller batch at the end would be compiled for too
        if self.scenario == "offline":
            return asdict(offline(paint, whole, batch, clock))
        assert asked.latency is not None  # Traffic has seen to it
        most = self.most or offline(paint, whole, batch, clock).throughput
        found = server(paint, asked.queries, batch, asked.latency, self.plan.settings.seed, most, clock)
        if found is None:
            words = f"no rate keeps {WITHIN:g} % of {asked.queries} queries within {asked.latency:g} s"
            return {"scenario": "server", "generator": "own", "error": words, "bound": asked.latency}
        return {**asdict(found), "bound": asked.latency}
