"""What is measured of a contestant, and the arithmetic that follows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

from allaprima.benchmarks.contestants import Contestant, Model, Settings
from allaprima.benchmarks.process import peak_memory


@dataclass(frozen=True)
class Trial:
    """What one process measured.

    `few[i]` and `many[i]` are the seconds of two pictures painted one after the other, with the smaller
    and with the larger number of steps. `memory` is the process's peak in bytes.
    """

    few: tuple[float, ...]
    many: tuple[float, ...]
    memory: int


@dataclass(frozen=True)
class Spread:
    """The middle and the ends of a sample."""

    median: float
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Summary:
    """All trials of a contestant: seconds per step and per picture, the largest peak of memory in bytes."""

    step: Spread
    picture: Spread
    memory: int


def run_trial(
    contestant: Contestant,
    model: Model,
    settings: Settings,
    steps: tuple[int, int],
    repeats: int,
    picture: Path,
) -> Trial:
    """Open, paint once to warm up, then paint and time; the last picture of many steps goes to `picture`.

    Seconds go from the prompt to the finished Pillow image. To be called in a new process.
    """
    few, many = steps
    paint = contestant.open(contestant.source(model), contestant.precision, settings)
    paint(few)
    times: dict[int, list[float]] = {few: [], many: []}
    for _ in range(repeats):
        for count in steps:
            started = perf_counter()
            image = paint(count)
            times[count].append(perf_counter() - started)
    image.save(picture)
    return Trial(tuple(times[few]), tuple(times[many]), peak_memory())


def summarise(trials: Sequence[Trial], steps: tuple[int, int]) -> Summary:
    """Join the trials of one contestant.

    Seconds per step are the difference between the two pictures of a pair over the difference of their
    steps, so whatever both do alike (text, decoding, the first touch of memory) falls out.
    """
    distance = steps[1] - steps[0]
    per_step = [
        (many - few) / distance for trial in trials for few, many in zip(trial.few, trial.many, strict=True)
    ]
    pictures = [seconds for trial in trials for seconds in trial.many]
    return Summary(spread(per_step), spread(pictures), max(trial.memory for trial in trials))


def spread(values: Sequence[float]) -> Spread:
    """Median, minimum and maximum."""
    return Spread(statistics.median(values), min(values), max(values))


def psnr(picture: Path, reference: Path) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures in dB: 99 if equal, 0 if their sizes differ."""
    with Image.open(picture) as one, Image.open(reference) as other:
        a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if a.shape != b.shape:
        return 0.0
    error = float(np.square(a - b).mean())
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))
