"""Jobs of which pictures are being painted, and how they end."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field

from allaprima.bundle import AllaprimaError, BackendError, RequestError
from allaprima.runtime import Result, Settings
from allaprima.runtime.painting import Painting
from allaprima.runtime.safety import warn_flagged
from allaprima.serve.groups import Group
from allaprima.serve.jobs import Job
from allaprima.serve.shelf import Shelved

_LOG = logging.getLogger("allaprima.serve")


@dataclass(eq=False)
class Begun:
    """A job of which pictures are being painted: what still waits, what is painted, and what is done."""

    job: Job
    model: Shelved
    waiting: deque[tuple[int, Settings]]
    paintings: dict[Painting, tuple[int, Group | None]] = field(default_factory=dict)
    done: dict[int, tuple[Painting, Result]] = field(default_factory=dict)


@dataclass(eq=False)
class Preparing:
    """A picture of a job that is being prepared, and the seconds that this took so far."""

    begun: Begun
    index: int
    parts: Generator[None, None, Painting]
    seconds: float = 0.0


def told(error: Exception) -> AllaprimaError:
    """What a job failed with: it alone, whatever it was, and not the server."""
    if isinstance(error, RequestError):
        return error
    _LOG.error("a picture failed", exc_info=error)
    if isinstance(error, AllaprimaError):
        return error
    if isinstance(error, MemoryError):
        return BackendError("there is not enough memory for this request: ask for fewer or smaller pictures")
    return BackendError(f"it could not be painted ({type(error).__name__}): the server's log says more")


def together(begun: Begun) -> Result:
    """The pictures of a job, in order; the timings are the sums of theirs."""
    parts = [begun.done[index] for index in sorted(begun.done)]
    results = [result for _, result in parts]
    flagged = None
    if all(result.flagged is not None for result in results):
        flagged = tuple(flag for result in results for flag in result.flagged or ())
    warnings = dict.fromkeys(warning for painting, _ in parts for warning in painting.warnings)
    return Result(
        tuple(image for result in results for image in result.images),
        tuple(each for result in results for each in result.parameters),
        {stage: sum(result.timings[stage] for result in results) for stage in results[0].timings},
        (*warnings, *warn_flagged(flagged)),
        flagged,
    )
