"""How many lanes are worth it: measured, since it depends on the device, the model and the size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

from allaprima.bundle import BackendError, RequestError
from allaprima.runtime import Pipeline, Request

GAIN = 1.03
"""By how much twice as many lanes must paint more in a second to be worth their latency."""


def count_lanes(rate: Callable[[int], float], most: int) -> int:
    """The fewest lanes, a power of two up to `most`, from which on there is little to gain.

    `rate` gives the steps of one picture that so many lanes take in a second together; BackendError or
    RequestError if there can be no more lanes.
    """
    lanes, best = 1, rate(1)
    while lanes * 2 <= most:
        try:
            more = rate(lanes * 2)
        except (BackendError, RequestError):
            break
        if more < best * GAIN:
            break
        lanes, best = lanes * 2, more
    return lanes


def measure_lanes(pipeline: Pipeline, height: int, width: int, most: int) -> int:
    """`count_lanes` for pictures of a size, with guidance, on a pipeline that is not painting.

    Its kernels are warm afterwards. Raises BackendError or RequestError if not even one lane works.
    """
    defaults = pipeline.bundle.manifest.defaults
    guided = Request(
        "", height=height, width=width, num_inference_steps=4, seed=0, guidance_scale=defaults.guidance_scale
    )
    (settings,) = pipeline.settle(guided)

    def rate(count: int) -> float:
        paintings = [pipeline.prepare(settings) for _ in range(count)]
        lanes = pipeline.lanes(paintings[0].shape, count)
        for painting in paintings:
            lanes.admit(painting)
        seconds = []
        for _ in range(3):  # the first of them warms up
            started = perf_counter()
            lanes.step()
            pipeline.wait()
            seconds.append(perf_counter() - started)
        lanes.drop()
        return count / min(seconds[1:])

    return count_lanes(rate, most)


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
