"""What is asked of every contestant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product

from allaprima.bundle import RequestError


@dataclass(frozen=True, order=True)
class Work:
    """One configuration: pictures in a batch, their size in pixels, and denoising steps."""

    batch: int
    width: int
    height: int
    steps: int

    def __str__(self) -> str:
        """For tables and messages."""
        return f"{self.steps} step{'s' * (self.steps > 1)}, batch {self.batch}, {self.width}x{self.height}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """What decides the shapes of tensors: batch, width, height."""
        return self.batch, self.width, self.height


@dataclass(frozen=True)
class Settings:
    """What is the same in all configurations. `sampler` None is the model's own; `threads` for everybody."""

    prompt: str
    sampler: str | None
    seed: int
    guidance_scale: float
    threads: int


@dataclass(frozen=True)
class Plan:
    """Every contestant in turn, A B A B, `rounds` times; in a turn every configuration `repeats` times.

    Raises RequestError where nothing could be measured.
    """

    works: tuple[Work, ...]
    settings: Settings
    rounds: int
    repeats: int

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.repeats < 1:
            raise RequestError(f"{self.rounds} rounds of {self.repeats} repeats: needs at least 1 of each")
        if self.settings.threads < 1:
            raise RequestError(f"threads is {self.settings.threads}: give at least 1")
        if not self.works:
            raise RequestError("there is no configuration to measure: give steps, sizes and batches")

    def shown(self) -> Work:
        """The configuration at which contestants stand side by side: see `side_by_side`."""
        return side_by_side(self.works)

    def by_shape(self) -> Iterator[tuple[Work, list[Work]]]:
        """For each shape a warm-up, and the configurations to be painted after it.

        Two steps warm up, since some backends record their work in the first and replay it from the second.
        """
        for _, group in groupby(self.works, lambda work: work.shape):
            works = list(group)
            yield replace(works[0], steps=2), works


def side_by_side(works: Iterable[Work]) -> Work:
    """Of several configurations the one to show: smallest batch, largest picture, 20 steps or else most."""
    found = set(works)
    batch = min(work.batch for work in found)
    size = max((work.width * work.height, work.width) for work in found if work.batch == batch)
    mine = [work for work in found if work.batch == batch and (work.width * work.height, work.width) == size]
    return max(mine, key=lambda work: (work.steps == 20, work.steps))


def grid(steps: Sequence[int], sizes: Sequence[tuple[int, int]], batches: Sequence[int]) -> tuple[Work, ...]:
    """All combinations, those of one shape together, each once.

    Raises RequestError for a number below 1.
    """
    for name, values in (
        ("steps", steps),
        ("batch", batches),
        ("size", [side for size in sizes for side in size]),
    ):
        if any(value < 1 for value in values):
            raise RequestError(f"{name} is {min(values)}: give at least 1")
    works = (Work(batch, *size, count) for batch, size, count in product(batches, sizes, steps))
    return tuple(sorted(set(works)))
