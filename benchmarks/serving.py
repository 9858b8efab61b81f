"""How long users wait: pictures that join others between steps, against batches, against one after the other.

```
python -m allaprima.benchmarks.serving shapes
```

Requests of several step counts come as a Poisson process, the same ones for each way of batching. The rates
are shares of the capacity, which is what the pipeline paints offline, sorted into whole batches of one step
count. A latency counts from the arrival to the picture in memory; HTTP and PNG are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allaprima.benchmarks.arithmetic import percentile, poisson_arrivals
from allaprima.benchmarks.report import RESULTS, stamp, table, write_result
from allaprima.bundle import AllaprimaError, open_bundle, resolve
from allaprima.cli.machine import read_machine
from allaprima.engine import parse_sizes
from allaprima.runtime import Pipeline, Request
from allaprima.serve.jobs import Order
from allaprima.serve.limits import Limits
from allaprima.serve.studio import Studio

WAYS = ("continuous", "static", "none")
"""Join at every step; whole batches, of which each picture leaves when it is done; one after the other."""
LIMITS = Limits(queue=100_000, deadline=36_000.0, most_deadline=36_000.0)
PROMPT = "a red circle above a blue square on a white background"


@dataclass(frozen=True)
class Traffic:
    """Requests in the order in which they come: `steps` and seeds by their place, all of one size."""

    steps: tuple[int, ...]
    height: int
    width: int

    def request(self, index: int) -> Request:
        """The request of a place."""
        return Request(
            PROMPT, seed=index, num_inference_steps=self.steps[index], height=self.height, width=self.width
        )


@dataclass(frozen=True)
class Setting:
    """How pictures are painted: a bundle, a backend, the threads, and the lanes of a batch."""

    bundle: Path
    backend: str
    precision: str | None
    threads: int
    lanes: int

    def open(self, folder: Path, limit: int | None = None) -> Pipeline:
        """A pipeline."""
        return Pipeline.open(
            folder, backend=self.backend, precision=self.precision, threads=self.threads, memory_limit=limit
        )


@dataclass(frozen=True)
class Served:
    """What a run came to. Seconds; `goodput` and `throughput` are pictures a second.

    Goodput counts those that were done within the bound.
    """

    way: str
    load: float
    rate: float
    p50: float
    p95: float
    p99: float
    goodput: float
    throughput: float


def draw_traffic(kinds: Sequence[int], count: int, height: int, width: int, seed: int) -> Traffic:
    """So many requests; each step count is as likely as the others."""
    chosen = np.random.default_rng(seed).choice(list(kinds), count)
    return Traffic(tuple(int(each) for each in chosen), height, width)


def paint_offline(setting: Setting, traffic: Traffic) -> tuple[float, float]:
    """Pictures a second if all are there from the start, in batches; the mean seconds of one alone."""
    lanes = setting.lanes
    with setting.open(setting.bundle) as pipeline:

        def paint(steps: int, count: int) -> float:
            started = time.perf_counter()
            pipeline.generate(
                PROMPT,
                num_inference_steps=steps,
                num_images=count,
                seed=0,
                height=traffic.height,
                width=traffic.width,
            )
            return time.perf_counter() - started

        kinds = sorted(set(traffic.steps))
        alone = {steps: min(paint(steps, 1) for _ in range(2)) for steps in kinds}
        total = 0.0
        paint(kinds[0], lanes)
        for steps in kinds:
            of_it = traffic.steps.count(steps)
            whole, rest = divmod(of_it, lanes)
            batches = [paint(steps, lanes) for _ in range(min(3, whole))]
            total += whole * statistics.median(batches) if batches else 0.0
            total += paint(steps, rest) if rest else 0.0
    return len(traffic.steps) / total, statistics.fmean(alone[steps] for steps in traffic.steps)


@contextmanager
def opened_studio(setting: Setting, way: str, size: tuple[int, int]) -> Iterator[Studio]:
    """A studio that batches in one of the ways, warm."""
    lanes = 1 if way == "none" else setting.lanes
    studio = Studio(
        [setting.bundle], setting.open, limits=LIMITS, lanes=lanes, warm=[size], joins=way != "static"
    )
    studio.start()
    try:
        if not studio.wait_ready():
            raise studio.failure or AllaprimaError("the studio did not start")
        _settle(studio, lanes, size)
        yield studio
    finally:
        studio.close()


def _settle(studio: Studio, lanes: int, size: tuple[int, int]) -> None:
    """Let it paint with every number of lanes once, since kernels and buffers are made at the first use."""

    async def paint() -> None:
        request = Request(PROMPT, num_inference_steps=2, height=size[0], width=size[1])
        for count in range(1, lanes + 1):
            await asyncio.gather(*(studio.submit(Order(request)).wait() for _ in range(count)))

    asyncio.run(paint())


def serve(studio: Studio, traffic: Traffic, arrivals: Sequence[float]) -> tuple[list[float], float]:
    """Send each request at its moment; latencies from then on, and the seconds until the last was done."""

    async def one(index: int, started: float) -> float:
        arrival = started + arrivals[index]
        await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
        job = studio.submit(Order(traffic.request(index)))
        await job.wait()
        return time.perf_counter() - arrival

    async def everybody() -> tuple[list[float], float]:
        started = time.perf_counter()
        latencies = await asyncio.gather(*(one(index, started) for index in range(len(arrivals))))
        return latencies, time.perf_counter() - started

    return asyncio.run(everybody())


def summarise(
    way: str, load: float, rate: float, latencies: Sequence[float], seconds: float, bound: float
) -> Served:
    """The figures of one run, of which `bound` seconds were allowed for each picture."""
    p50, p95, p99 = (percentile(latencies, percent) for percent in (50, 95, 99))
    in_time = sum(each <= bound for each in latencies)
    return Served(way, load, rate, p50, p95, p99, in_time / seconds, len(latencies) / seconds)


def measure(
    setting: Setting,
    traffic: Traffic,
    loads: Sequence[float],
    tell: Callable[[str], None],
    seed: int,
    bound: float,
) -> dict[str, Any]:
    """All loads, the ways taking turns, and what all at once come to. `bound` in times of a picture alone."""
    size = traffic.height, traffic.width
    tell("offline")
    capacity, alone = paint_offline(setting, traffic)
    runs: list[Served] = []
    at_once: dict[str, float] = {}
    with ExitStack() as stack:
        studios = {way: stack.enter_context(opened_studio(setting, way, size)) for way in WAYS}
        for load, (way, studio) in itertools.product(loads, studios.items()):
            tell(f"{load:g} of capacity, {way}")
            arrivals = poisson_arrivals(load * capacity, len(traffic.steps), seed)
            latencies, seconds = serve(studio, traffic, arrivals)
            runs.append(summarise(way, load, load * capacity, latencies, seconds, bound * alone))
        for way, studio in studios.items():
            tell(f"all at once, {way}")
            _, seconds = serve(studio, traffic, [0.0] * len(traffic.steps))
            at_once[way] = len(traffic.steps) / seconds
    tell("offline again")
    capacity_after, _ = paint_offline(setting, traffic)
    return {
        "capacity": capacity,
        "capacity_after": capacity_after,
        "alone": alone,
        "bound": bound * alone,
        "at_once": at_once,
        "runs": [asdict(each) for each in runs],
    }


def tabulate(results: Mapping[str, Any]) -> list[str]:
    """The tables of latencies, and of throughput when all come at once."""
    rows = [
        [
            f"{run['load']:g}",
            run["way"],
            *(f"{run[key]:.2f}" for key in ("p50", "p95", "p99")),
            *(f"{run[key]:.3f}" for key in ("goodput", "throughput")),
        ]
        for run in sorted(results["runs"], key=lambda run: (run["load"], WAYS.index(run["way"])))
    ]
    head = ["load", "batching", "p50, s", "p95, s", "p99, s", "goodput, pictures/s", "throughput, pictures/s"]
    capacity = (results["capacity"] + results["capacity_after"]) / 2
    at_once = [[way, f"{rate:.3f}", f"{rate / capacity:.3f}"] for way, rate in results["at_once"].items()]
    at_once.append(
        ["offline, before and after", f"{results['capacity']:.3f}, {results['capacity_after']:.3f}", "1"]
    )
    return [*table(head, rows), "", *table(["all at once", "pictures/s", "of offline"], at_once)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", help="a folder or built-in name")
    parser.add_argument("--backend", default="openvino", help="of the runtime (openvino)")
    parser.add_argument("--precision", help="of the arithmetic (the backend's best)")
    parser.add_argument("--size", metavar="WxH", help="in pixels (the model's own)")
    parser.add_argument("--lanes", type=int, default=4, help="pictures together, at most (4)")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 20], help="equally likely (4 8 20)")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 0.95, 1.2], help="of capacity")
    parser.add_argument("--queries", type=int, default=200, help="of each run (200)")
    parser.add_argument(
        "--bound", type=float, default=5.0, help="of goodput, in times of a picture alone (5)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for name in ("queries", "lanes", "bound"):
        if (given := getattr(options, name)) <= 0:
            parser.error(f"--{name} is {given}: give more than 0")
    for each in itertools.chain(options.steps, options.loads):
        if each <= 0:
            parser.error(f"{each} among --steps or --loads: give more than 0")
    command = shlex.join(["python", "-m", "allaprima.benchmarks.serving", *arguments])
    try:
        print(_measure(options, command))
    except AllaprimaError as error:
        raise SystemExit(f"error: {error}") from None


def _measure(options: argparse.Namespace, command: str) -> str:
    bundle = open_bundle(resolve(options.bundle))
    defaults = bundle.manifest.defaults
    width, height = parse_sizes(options.size)[0] if options.size else (defaults.width, defaults.height)
    threads = read_machine().cores
    setting = Setting(bundle.folder, options.backend, options.precision, threads, options.lanes)
    traffic = draw_traffic(options.steps, options.queries, height, width, options.seed)
    results = measure(setting, traffic, options.loads, _tell, options.seed, options.bound)
    name = f"serving-{bundle.manifest.name}"
    kinds = ", ".join(map(str, options.steps))
    lines = [
        f"{bundle.manifest.name} at {width}x{height}, {options.backend}, at most {options.lanes} lanes, "
        f"{options.queries} requests a run, each with one of {kinds} steps. A picture alone takes "
        f"{results['alone']:.2f} s; goodput counts what is done within {results['bound']:.2f} s.",
        "",
        *tabulate(results),
    ]
    about = {**stamp(command, bundle.manifest.name, threads), "steps": options.steps, "lanes": options.lanes}
    about |= {"backend": options.backend, "queries": options.queries, "size": [width, height]}
    return write_result(options.results, name, {**about, **results}, lines)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
