"""How much of a picture's time is the engines' and the copies', told apart without touching the runtime.

A pipeline that is opened with `EngineClock.watch` runs wrapped sessions; any other pays nothing. Where a
backend computes before `run` returns, the host's clock is read around it. On a device both ends are marked in
the stream, and read when everything is done.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from allaprima.bundle import TensorSpec
from allaprima.runtime.cuda import CudaMemory, default_gpu
from allaprima.runtime.memory import Block, Layout, Memory, Tensor
from allaprima.runtime.session import Binding, Session

TRANSFER = "transfer"
"""What copies between host and device are counted under."""


@dataclass(frozen=True)
class Share:
    """Seconds spent in one component, and how often it ran."""

    seconds: float
    calls: int


class Stream(Protocol):
    """What of a GPU is needed here."""

    def mark(self) -> Any:
        """Mark this place, with its time."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two marks that were reached."""

    def synchronize(self) -> None:
        """Wait for everything."""


class EngineClock:
    """Sums the time of engines and of copies, by component."""

    def __init__(self, gpu: Callable[[], Stream] = default_gpu) -> None:
        self._gpu = gpu
        self._stream: Stream | None = None
        self._spans: list[tuple[str, Any, Any]] = []

    @property
    def on_device(self) -> bool:
        """Whether any session that was watched works on a device."""
        return self._stream is not None

    def watch(self, role: str, session: Session) -> Session:
        """The same session, timed."""
        if not isinstance(session.memory, CudaMemory):
            return TimedSession(session, session.memory, self, role)
        self._stream = self._gpu()
        return TimedSession(session, TimedMemory(session.memory, self), self, role)

    @contextmanager
    def span(self, role: str) -> Iterator[None]:
        """Count what happens inside."""
        stream = self._stream
        begin = perf_counter() if stream is None else stream.mark()
        yield
        self._spans.append((role, begin, perf_counter() if stream is None else stream.mark()))

    def take(self) -> dict[str, Share]:
        """What was counted since the last time."""
        if self._stream is not None:
            self._stream.synchronize()
        between = (lambda a, b: b - a) if self._stream is None else self._stream.seconds
        seconds: defaultdict[str, float] = defaultdict(float)
        calls: defaultdict[str, int] = defaultdict(int)
        for role, begin, end in self._spans:
            seconds[role] += between(begin, end)
            calls[role] += 1
        self._spans.clear()
        return {role: Share(seconds[role], calls[role]) for role in seconds}


class TimedSession:
    """See Session: as `inner`, with its runs counted."""

    def __init__(self, inner: Session, memory: Memory, clock: EngineClock, role: str) -> None:
        self._inner, self._clock, self._role = inner, clock, role
        self.memory = memory

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """See Session."""
        return self._inner.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """See Session."""
        return self._inner.outputs

    @property
    def precision(self) -> str:
        """See Session."""
        return self._inner.precision

    def bind(self, tensors: Mapping[str, Tensor]) -> Binding:
        """See Session.bind."""
        return TimedBinding(self._inner.bind(tensors), self._clock, self._role)

    def unload(self) -> None:
        """See Session.unload."""
        self._inner.unload()

    def close(self) -> None:
        """See Session.close."""
        self._inner.close()


class TimedBinding:
    """See Binding."""

    def __init__(self, inner: Binding, clock: EngineClock, role: str) -> None:
        self._inner, self._clock, self._role = inner, clock, role

    def run(self) -> None:
        """See Binding.run."""
        with self._clock.span(self._role):
            self._inner.run()


class TimedMemory:
    """See Memory: of a device, with its copies counted."""

    def __init__(self, inner: Memory, clock: EngineClock) -> None:
        self._inner, self._clock = inner, clock

    def allocate(self, layout: Layout) -> Block:
        """See Memory.allocate."""
        return TimedBlock(self._inner.allocate(layout), self._clock)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See Memory.copy."""
        with self._clock.span(TRANSFER):
            self._inner.copy(target, source)

    def synchronize(self) -> None:
        """See Memory.synchronize."""
        self._inner.synchronize()

    def attach(self) -> None:
        """See Memory.attach."""
        self._inner.attach()


class TimedBlock:
    """See Block."""

    def __init__(self, inner: Block, clock: EngineClock) -> None:
        self._inner, self._clock = inner, clock

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """See Block."""
        return self._inner.tensors

    def push(self) -> None:
        """See Block.push."""
        with self._clock.span(TRANSFER):
            self._inner.push()

    def pull(self) -> None:
        """See Block.pull."""
        # The first mark stands behind all work that is still on its way, so waiting for that is not counted.
        with self._clock.span(TRANSFER):
            self._inner.pull()
