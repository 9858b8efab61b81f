"""The ways of asking, with a clock that is made up: every latency is known."""

import math
import queue
from types import SimpleNamespace

import pytest

from allaprima.benchmarks import loadgen
from allaprima.benchmarks.scenarios import (
    HALVINGS,
    Clock,
    Traffic,
    largest_rate,
    offline,
    serve,
    server,
    single_stream,
)
from allaprima.bundle import RequestError


class Machine(Clock):
    """Paints each picture in a second, and a batch of several in as many half seconds."""

    def __init__(self) -> None:
        self.time, self.batches = 100.0, list[int]()

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def paint(self, count: int) -> None:
        self.batches.append(count)
        self.time += 1.0 if count == 1 else 0.5 * count


def test_single_stream() -> None:
    machine = Machine()
    found = single_stream(machine.paint, 10, machine)
    assert (found.queries, found.throughput, found.mean, found.p50, found.p99) == (10, 1.0, 1.0, 1.0, 1.0)


def test_offline_paints_full_batches() -> None:
    machine = Machine()
    found = offline(machine.paint, 10, 4, machine)
    assert machine.batches == [4, 4, 2]
    assert found.throughput == 10 / 5
    assert (found.p50, found.p99) == (4.0, 5.0)


def test_queries_wait_for_their_turn() -> None:
    machine = Machine()
    assert serve(machine.paint, [0.5, 0.75, 5.0], 1, machine) == [1.0, 1.75, 1.0]
    assert machine.now() == 106.0


def test_who_waits_is_painted_together() -> None:
    machine = Machine()
    assert serve(machine.paint, [0.5, 0.75, 1.0, 1.25], 2, machine) == [1.0, 1.75, 1.5, 2.25]
    assert machine.batches == [1, 2, 1]


def test_a_hopeless_rate_is_given_up() -> None:
    machine = Machine()
    latencies = serve(machine.paint, [0.01 * index for index in range(200)], 1, machine, bound=3.0)
    # One in a hundred may be late, so with the third that is late all hope is gone.
    assert len(latencies) == 6
    assert len(serve(machine.paint, [0.01 * index for index in range(200)], 1, machine)) == 200


@pytest.mark.parametrize(("truth", "wanted"), [(0.7, 0.7), (5.0, 2.0), (0.001, 0.0)])
def test_bisection(truth: float, wanted: float) -> None:
    found = largest_rate(lambda rate: rate <= truth, 2.0)
    assert found <= truth
    assert found == pytest.approx(wanted, abs=2.0 / 2**HALVINGS)


def test_the_largest_rate_of_a_server_is_that_of_its_queue() -> None:
    """A server of one picture a second: of M/D/1 at a load of 0.5, the mean wait is half a second."""
    machine = Machine()
    found = server(machine.paint, 2000, 1, bound=4.0, seed=3, most=1.0, clock=machine)
    assert found is not None
    assert found.rate is not None
    assert 0.3 < found.rate < 0.9
    assert found.p99 <= 4.0
    load = found.rate
    assert found.mean == pytest.approx(1 + load / (2 * (1 - load)), rel=0.15)
    assert server(machine.paint, 50, 1, bound=0.9, seed=3, most=1.0, clock=machine) is None


@pytest.mark.parametrize(
    ("scenarios", "queries", "latency", "why"),
    [
        (("serve",), 10, None, "unknown scenario 'serve'"),
        (("offline",), 1, None, "queries is 1"),
        (("server",), 10, None, "--latency"),
        (("server",), 10, -1.0, "--latency"),
    ],
)
def test_what_cannot_be_asked(
    scenarios: tuple[str, ...], queries: int, latency: float | None, why: str
) -> None:
    with pytest.raises(RequestError, match=why):
        Traffic(scenarios, queries, latency, loadgen=False)


SUMMARY = """
SUT name : PySUT
Completed samples per second    : 50.76
Result is : INVALID
Min latency (ns)                : 10210406
Mean latency (ns)               : 15071887
50.00 percentile latency (ns)   : 10744635
90.00 percentile latency (ns)   : 25198908
99.00 percentile latency (ns)   : 37835309
99.90 percentile latency (ns)   : 37835309
"""


def test_loadgens_summary() -> None:
    found = loadgen.read_summary(SUMMARY)
    assert found == pytest.approx(
        {"throughput": 50.76, "mean": 0.015071887, "p50": 0.010744635, "p90": 0.025198908, "p99": 0.037835309}
    )
    alone = loadgen.read_summary(SUMMARY.replace("Completed samples per second", "Something else"))
    assert alone["throughput"] == pytest.approx(1 / 0.015071887)


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ([[1, 2, 3, 4, 5, 6]], [2, 2, 2]),
        ([[1, 2, 3], [4]], [2, 2]),
        ([[1], [2], [3]], [2, 1]),
        ([[1, 2, 3]], [2, 1]),
        ([], []),
    ],
)
def test_what_was_asked_at_once_is_painted_in_full_batches(asked: list[list[int]], wanted: list[int]) -> None:
    waiting: loadgen.Waiting = queue.SimpleQueue()
    for samples in (*asked, None):
        waiting.put(samples)
    painted: list[int] = []
    done: list[int] = []
    library = SimpleNamespace(QuerySamplesComplete=done.extend, QuerySampleResponse=lambda name, *_: name)
    loadgen._paint_all(painted.append, waiting, 2, library)
    assert painted == wanted
    assert done == [sample for samples in asked for sample in samples]


@pytest.mark.parametrize("scenario", ["single-stream", "offline", "server"])
def test_loadgen_asks_as_often(scenario: str) -> None:
    pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen has no wheel for this platform")
    painted: list[int] = []
    own = {"scenario": scenario, "queries": 20, "mean": 0.001, "rate": 200.0, "bound": 1.0}
    found = loadgen.repeat(painted.append, own, 4, seed=7)
    assert sum(painted) == 20
    assert max(painted) <= 4
    assert found["queries"] == 20
    assert found["generator"] == "loadgen"
    assert 0 < found["p50"] <= found["p99"] < math.inf
    assert found["throughput"] > 0
