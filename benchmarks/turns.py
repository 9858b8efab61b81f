"""One turn of one contestant: a process of its own that says every measurement at once.

So what was measured outlives a turn that is cut short, whoever cuts it.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

from PIL.Image import Image

from allaprima.benchmarks.contestants import Contestant, Painted, Painter
from allaprima.benchmarks.nvml import PeakDevice, used_memory
from allaprima.benchmarks.plan import Plan, Settings, Work
from allaprima.benchmarks.process import peak_memory, reason_of
from allaprima.benchmarks.quality import picture_name

Message = tuple[str, Any]
Say = Callable[[Message], None]
Job = Callable[[Say], None]

GRACE = 5.0
"""Seconds that a process may take to end."""
KILLED = "the process was killed, perhaps for want of memory"


@dataclass(frozen=True)
class Picture:
    """One call of a contestant: all in seconds.

    `seconds` go from the prompt to the pictures of the batch; `png` is what it takes to encode one of them,
    which is not in `seconds`. `engine` is the part that the graphs took, None if it is not known.
    """

    work: Work
    seconds: float
    png: float
    stages: Mapping[str, float]
    engine: Mapping[str, tuple[float, int]] | None


@dataclass
class Turn:
    """What came of one turn. Memory is the process's peak, in bytes.

    `warm_up` has the seconds of the first picture of each shape, where some libraries compile.
    """

    round: int
    load: float | None = None
    memory: int | None = None
    device_memory: int | None = None
    pictures: list[Picture] = field(default_factory=list)
    complete: bool = False
    warm_up: list[float] = field(default_factory=list)


def run_turn(
    contestant: Contestant, plan: Plan, number: int, *, cache: Path | None, keep: Path | None = None
) -> Generator[Turn, None, None]:
    """The turn as it grows: one object, given again after every measurement.

    One picture of each configuration goes to the folder `keep`. `cache` is where the
    contestant's engines lie, None for the user's own cache. Raises RuntimeError with the reason if it fails.
    """
    turn = Turn(number)
    for kind, value in listen(Painting(contestant, plan, cache, keep)):
        if kind == "loaded":
            turn.load = value
        elif kind == "warmed up":
            turn.warm_up.append(value)
            continue
        elif kind == "picture":
            turn.pictures.append(value)
        elif kind == "memory":
            turn.memory, turn.device_memory = value
        yield turn
    turn.complete = True
    yield turn


@dataclass(frozen=True)
class Painting:
    """The job of a turn: open, then for each shape warm up and paint every configuration `repeats` times."""

    contestant: Contestant
    plan: Plan
    cache: Path | None
    keep: Path | None

    def __call__(self, say: Say) -> None:
        """Do it, and say what was measured."""
        contestant, plan = self.contestant, self.plan
        with (
            PeakDevice(used_memory if contestant.gpu else lambda: None) as device,
            opened(contestant, plan.settings, plan.works, self.cache) as (painter, load),
        ):
            say(("loaded", load))
            for warm_up, works in plan.by_shape():
                started = perf_counter()
                painter.paint(warm_up)
                say(("warmed up", perf_counter() - started))
                for repeat in range(plan.repeats):
                    for work in works:
                        picture, painted = time_picture(painter, work)
                        say(("picture", picture))
                        if self.keep is not None and repeat == 0:
                            save_whole(painted.images[0], self.keep / picture_name(work))
            say(("memory", (painter.host_memory() or peak_memory(), device.peak())))


def save_whole(image: Image, path: Path) -> None:
    """Write a PNG, whole or not at all, whoever ends the process meanwhile."""
    partial = path.with_name("unfinished")
    image.save(partial, format="PNG")
    partial.replace(path)


@dataclass(frozen=True)
class Preparation:
    """The job before all turns: build the contestant's engines; with `load`, open it once too.

    Its files are then in memory, so that no turn has to wait for the disk.
    """

    contestant: Contestant
    settings: Settings
    works: tuple[Work, ...]
    cache: Path | None
    load: bool

    def __call__(self, say: Say) -> None:
        """Do it."""
        use_cache(self.cache)
        if self.contestant.build is not None:
            self.contestant.build(self.works)
        if self.load:
            with opened(self.contestant, self.settings, self.works, self.cache):
                pass


def prepare(
    contestant: Contestant,
    settings: Settings,
    works: Sequence[Work],
    cache: Path | None,
    *,
    load: bool = False,
) -> None:
    """Make ready for these works what is not to be measured.

    Raises RuntimeError with the reason if it fails.
    """
    if contestant.build is not None or load:
        with closing(listen(Preparation(contestant, settings, tuple(works), cache, load))) as said:
            deque(said, maxlen=0)


def use_cache(cache: Path | None) -> None:
    """Let this process keep engines in a folder of its own; None leaves it the user's."""
    if cache is not None:
        os.environ["ALLAPRIMA_CACHE"] = str(cache)


@contextmanager
def opened(
    contestant: Contestant, settings: Settings, works: Sequence[Work], cache: Path | None
) -> Iterator[tuple[Painter, float]]:
    """A contestant's model, and the seconds it took to load, the import of its libraries included."""
    use_cache(cache)
    started = perf_counter()
    painter = contestant.open(settings, works)
    try:
        yield painter, perf_counter() - started
    finally:
        painter.close()


def time_picture(painter: Painter, work: Work) -> tuple[Picture, Painted]:
    """Paint a batch and time it."""
    started = perf_counter()
    painted = painter.paint(work)
    seconds = perf_counter() - started
    started = perf_counter()
    painted.images[0].save(io.BytesIO(), format="PNG")
    png = perf_counter() - started
    engine = {role: (share.seconds, share.calls) for role, share in painted.engine.items()}
    return Picture(work, seconds, png, dict(painted.stages), engine or None), painted


def listen(job: Job) -> Generator[Message, None, None]:
    """What a job says in a process of its own, as it says it.

    The process ends when the iterator is closed. Raises RuntimeError with the reason if the job fails.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            try:
                kind, value = ours.recv()
            except EOFError:
                raise RuntimeError(KILLED) from None
            if kind in ("end", "failed"):
                process.join(GRACE)  # what it shares with others, as tqdm's locks, it has to put away itself
            if kind == "end":
                return
            if kind == "failed":
                raise RuntimeError(value)
            yield kind, value
    finally:
        ours.close()
        process.terminate()
        process.join()


def _work(job: Job, connection: Connection) -> None:
    # Ctrl-C reaches all processes of the terminal: the parent decides what becomes of this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        job(connection.send)
        last: Message = "end", None
    except BrokenPipeError:  # nobody listens any more
        return
    except Exception as error:  # a peer that is missing or broken is a result, not the end
        last = "failed", reason_of(error)
    with suppress(BrokenPipeError):
        connection.send(last)
