"""How many lanes are worth it: measured, since it depends on the device, the model and the size."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from time import perf_counter
from typing import TypeVar

from allaprima.bundle import BackendError, RequestError
from allaprima.runtime import Pipeline, Request

GAIN = 1.03
"""By how much twice as many lanes must paint more in a second to be worth their latency."""


Found = TypeVar("Found")
Measuring = Generator[None, None, Found]
"""Stops after each step, so that others can take theirs."""


def count_lanes(rate: Callable[[int], Measuring[float]], most: int) -> Measuring[int]:
    """The fewest lanes, a power of two up to `most`, from which on there is little to gain.

    `rate` gives the steps of one picture that so many lanes take in a second together; BackendError or
    RequestError if there can be no more lanes.
    """
    lanes = 1
    best = yield from rate(1)
    while lanes * 2 <= most:
        try:
            more = yield from rate(lanes * 2)
        except (BackendError, RequestError):
            break
        if more < best * GAIN:
            break
        lanes, best = lanes * 2, more
    return lanes


def measure_lanes(pipeline: Pipeline, height: int, width: int, most: int) -> Measuring[int]:
    """`count_lanes` for pictures of a size, with guidance.

    The pipeline must not be preparing another picture; its kernels are warm afterwards.
    Raises BackendError or RequestError if not even one lane works.
    """
    defaults = pipeline.bundle.manifest.defaults
    guided = Request(
        "", height=height, width=width, num_inference_steps=4, seed=0, guidance_scale=defaults.guidance_scale
    )
    (settings,) = pipeline.settle(guided)
    first = yield from pipeline.prepare_in_parts(settings)

    def rate(count: int) -> Measuring[float]:
        lanes = pipeline.lanes(first.shape, count)
        for _ in range(count):
            lanes.admit(replace(first))
        seconds = []
        for _ in range(3):  # the first of them warms up
            started = perf_counter()
            lanes.step()
            pipeline.wait()
            seconds.append(perf_counter() - started)
            yield
        lanes.drop()
        return count / min(seconds[1:])

    return (yield from count_lanes(rate, most))


def scaled(measured: Mapping[tuple[int, int], int], height: int, width: int) -> int:
    """The lanes of a size that was not measured: as many pixels at once as for the size nearest to it.

    One if nothing was measured.
    """
    if not measured:
        return 1
    pixels = height * width
    known = {tall * wide: lanes for (tall, wide), lanes in measured.items()}
    near = min(known, key=lambda each: max(each, pixels) / min(each, pixels))
    return max(1, known[near] * near // pixels)
