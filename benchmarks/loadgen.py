"""The same scenarios by MLCommons' LoadGen (`pip install mlcommons-loadgen`), to see that both agree."""

from __future__ import annotations

import importlib.util
import queue
import re
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Waiting = queue.SimpleQueue[list[int] | None]
"""What was asked for at once, so that no batch begins with a part of it; None is the end."""
NAMES = {"single-stream": "SingleStream", "offline": "Offline", "server": "Server"}


def available() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("mlperf_loadgen") is not None


def repeat(paint: Callable[[int], None], own: Mapping[str, Any], batch: int, seed: int) -> dict[str, Any]:
    """Run the scenario that our own generator ran, with as many queries and at the same rate.

    Pictures are painted in this thread, since a GPU's context belongs to it; LoadGen has another.
    """
    import mlperf_loadgen as lg

    waiting: Waiting = queue.SimpleQueue()

    def issue(samples: list[Any]) -> None:
        waiting.put([sample.id for sample in samples])

    sut = lg.ConstructSUT(issue, lambda: None)
    samples = lg.ConstructQSL(own["queries"], own["queries"], lambda indices: None, lambda indices: None)
    with tempfile.TemporaryDirectory() as folder:
        settings, logs = _settings(lg, own, seed), _logs(lg, folder)

        def test() -> None:
            try:
                lg.StartTestWithLogSettings(sut, samples, settings, logs)
            finally:
                waiting.put(None)

        thread = threading.Thread(target=test)
        thread.start()
        _paint_all(paint, waiting, batch, lg)
        thread.join()
        lg.DestroyQSL(samples)
        lg.DestroySUT(sut)
        summary = (Path(folder) / "mlperf_log_summary.txt").read_text(encoding="utf-8")
    return {
        **{name: own[name] for name in ("scenario", "rate", "bound") if name in own},
        **read_summary(summary),
        "queries": own["queries"],
        "generator": "loadgen",
    }


def _paint_all(paint: Callable[[int], None], waiting: Waiting, batch: int, lg: Any) -> None:
    """Paint what was asked for, whatever waits together up to `batch`, until there is no more."""
    found: list[int] = []
    ended = False
    while found or not ended:
        while not ended and (not found or (len(found) < batch and not waiting.empty())):
            following = waiting.get()
            ended = following is None
            found += following or []
        now, found = found[:batch], found[batch:]
        if now:
            paint(len(now))
            lg.QuerySamplesComplete([lg.QuerySampleResponse(each, 0, 0) for each in now])


def _settings(lg: Any, own: Mapping[str, Any], seed: int) -> Any:
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, NAMES[own["scenario"]])
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_query_count = settings.max_query_count = own["queries"]
    # The number of queries decides, not the ten minutes of a submission.
    settings.min_duration_ms = 1
    settings.schedule_rng_seed = settings.sample_index_rng_seed = settings.qsl_rng_seed = seed
    settings.single_stream_expected_latency_ns = int(own["mean"] * 1e9)
    # Offline is one query of as many samples as this rate gives in the time above, a tenth more.
    settings.offline_expected_qps = own["queries"] * 1000 / 1.1
    if own["scenario"] == "server":
        settings.server_target_qps = own["rate"]
        settings.server_target_latency_ns = int(own["bound"] * 1e9)
        settings.server_target_latency_percentile = 0.99
    return settings


def _logs(lg: Any, folder: str) -> Any:
    output = lg.LogOutputSettings()
    output.outdir, output.copy_summary_to_stdout = folder, False
    logs = lg.LogSettings()
    logs.log_output, logs.enable_trace = output, False
    return logs


def read_summary(text: str) -> dict[str, Any]:
    """The figures of LoadGen's summary, in seconds.

    Its verdict "VALID" is left out: it wants ten minutes, and more queries than it takes to compare.
    """

    def nanoseconds(name: str) -> float:
        found = re.search(rf"^{re.escape(name)} latency \(ns\)\s*: (\d+)", text, re.MULTILINE)
        return int(found[1]) / 1e9 if found else float("nan")

    found = re.search(r"amples per second\s*: ([\d.]+)", text, re.IGNORECASE)
    mean = nanoseconds("Mean")
    return {
        # Of a single stream it tells no rate: each query begins when the last one ends.
        "throughput": float(found[1]) if found else 1 / mean,
        "mean": mean,
        **{f"p{rank}": nanoseconds(f"{rank}.00 percentile") for rank in (50, 90, 99)},
    }
