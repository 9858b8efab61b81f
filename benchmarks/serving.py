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
from allaprima.runtime.loop import run_out
from allaprima.serve.calibration import measure_lanes
from allaprima.serve.jobs import Order
from allaprima.serve.limits import Limits
from allaprima.serve.loader import MOST_LANES
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
class Served:
    """What a run came to. Seconds; `goodput` and `throughput` are pictures a second.

    Goodput counts those that were done within the bound.
    """

    way: str
    load: float
    p50: float
    p95: float
    p99: float
    goodput: float
    throughput: float


def draw_traffic(kinds: Sequence[int], count: int, height: int, width: int, seed: int) -> Traffic:
    """So many requests; each step count is as likely as the others."""
    chosen = np.random.default_rng(seed).choice(list(kinds), count)
    return Traffic(tuple(int(each) for each in chosen), height, width)


def paint_offline(pipeline: Pipeline, traffic: Traffic, lanes: int) -> float:
    """Pictures a second if all are there from the start, in batches of one step count."""
    started = time.perf_counter()
    for steps in sorted(set(traffic.steps)):
        left = traffic.steps.count(steps)
        while left > 0:
            _paint(pipeline, traffic, steps, min(lanes, left))
            left -= lanes
    return len(traffic.steps) / (time.perf_counter() - started)


def paint_alone(pipeline: Pipeline, traffic: Traffic) -> float:
    """The mean seconds of a picture by itself; each step count the faster of two."""
    times = {
        steps: min(_paint(pipeline, traffic, steps, 1) for _ in range(2)) for steps in set(traffic.steps)
    }
    return statistics.fmean(times[steps] for steps in traffic.steps)


def _paint(pipeline: Pipeline, traffic: Traffic, steps: int, count: int) -> float:
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


@contextmanager
def opened_studio(pipeline: Pipeline, way: str, lanes: int, size: tuple[int, int]) -> Iterator[Studio]:
    """A studio that batches in one of the ways, warm, with a pipeline that others use at other times."""
    lanes = 1 if way == "none" else lanes
    studio = Studio(
        [pipeline.bundle.folder],
        lambda folder, limit: pipeline,
        limits=LIMITS,
        lanes=lanes,
        warm=[size],
        joins=way != "static",
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


def summarise(way: str, load: float, runs: Sequence[tuple[Sequence[float], float]], bound: float) -> Served:
    """The figures of runs (latencies, seconds) together, of which `bound` seconds were for each picture."""
    latencies = [each for found, _ in runs for each in found]
    seconds = sum(each for _, each in runs)
    p50, p95, p99 = (percentile(latencies, percent) for percent in (50, 95, 99))
    in_time = sum(each <= bound for each in latencies)
    return Served(way, load, p50, p95, p99, in_time / seconds, len(latencies) / seconds)


def measure(
    pipeline: Pipeline,
    lanes: int,
    traffic: Traffic,
    loads: Sequence[float],
    tell: Callable[[str], None],
    *,
    rounds: int,
    seed: int,
    bound: float,
) -> dict[str, Any]:
    """Rounds of all at once and of all loads, in which the ways take turns.

    Each round finds the capacity anew, since machines are not always equally fast, and has arrivals of its
    own. `bound` in times of a picture alone.
    """
    size = traffic.height, traffic.width
    found: dict[tuple[float, str], list[tuple[list[float], float]]] = {}
    saturated: list[dict[str, float]] = []
    with ExitStack() as stack:
        alone = paint_alone(pipeline, traffic)
        studios = {way: stack.enter_context(opened_studio(pipeline, way, lanes, size)) for way in WAYS}
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}: all at once")
            saturated.append(_saturate(pipeline, lanes, studios, traffic))
            capacity = saturated[-1]["offline"]
            for load, (way, studio) in itertools.product(loads, studios.items()):
                tell(f"round {number + 1} of {rounds}: {load:g} of {capacity:.3g} pictures/s, {way}")
                arrivals = poisson_arrivals(load * capacity, len(traffic.steps), seed + number)
                found.setdefault((load, way), []).append(serve(studio, traffic, arrivals))
    return {
        "alone": alone,
        "bound": bound * alone,
        "at_once": saturated,
        "runs": [asdict(summarise(way, load, runs, bound * alone)) for (load, way), runs in found.items()],
    }


def _saturate(
    pipeline: Pipeline, lanes: int, studios: Mapping[str, Studio], traffic: Traffic
) -> dict[str, float]:
    """Pictures a second of each way if all come at once, and offline, the mean of before and after."""
    before = paint_offline(pipeline, traffic, lanes)
    rates = {}
    for way, studio in studios.items():
        _, seconds = serve(studio, traffic, [0.0] * len(traffic.steps))
        rates[way] = len(traffic.steps) / seconds
    after = paint_offline(pipeline, traffic, lanes)
    return {"offline": 2 / (1 / before + 1 / after), **rates}


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
    at_once = []
    for way in ("offline", *WAYS):
        rates = [each[way] for each in results["at_once"]]
        shares = [each[way] / each["offline"] for each in results["at_once"]]
        spread = f"{statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})"
        at_once.append([way, f"{statistics.median(rates):.3f}", spread])
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
    parser.add_argument(
        "--lanes", type=int, help="pictures together, at most (measured, as a server does it)"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 20], help="equally likely (4 8 20)")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 0.95, 1.2], help="of capacity")
    parser.add_argument("--queries", type=int, default=200, help="of each run (200)")
    parser.add_argument("--rounds", type=int, default=3, help="of all runs (3)")
    parser.add_argument(
        "--bound", type=float, default=5.0, help="of goodput, in times of a picture alone (5)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for name in ("queries", "rounds", "lanes", "bound"):
        if (given := getattr(options, name)) is not None and given <= 0:
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
    traffic = draw_traffic(options.steps, options.queries, height, width, options.seed)
    with Pipeline.open(
        bundle.folder, backend=options.backend, precision=options.precision, threads=threads
    ) as pipeline:
        lanes = options.lanes or run_out(measure_lanes(pipeline, height, width, MOST_LANES))
        results = measure(
            pipeline,
            lanes,
            traffic,
            options.loads,
            _tell,
            rounds=options.rounds,
            seed=options.seed,
            bound=options.bound,
        )
    name = f"serving-{bundle.manifest.name}"
    kinds = ", ".join(map(str, options.steps))
    lines = [
        f"{bundle.manifest.name} at {width}x{height}, {options.backend}, at most {lanes} lanes, "
        f"{options.rounds} rounds of {options.queries} requests a run, each with one of {kinds} steps. "
        f"A picture alone takes {results['alone']:.2f} s; "
        f"goodput counts what is done within {results['bound']:.2f} s.",
        "",
        *tabulate(results),
    ]
    about = {**stamp(command, bundle.manifest.name, threads), "steps": options.steps, "lanes": lanes}
    about |= {
        "backend": options.backend,
        "queries": options.queries,
        "rounds": options.rounds,
        "size": [width, height],
    }
    return write_result(options.results, name, {**about, **results}, lines)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
