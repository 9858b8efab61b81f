"""A GPU that is made up: its memory is the host's, and nothing is done before it must.

Whatever is enqueued runs only when somebody waits for it, so a host that overwrites what is still to be
copied, or reads what is not there yet, gets another picture.
"""

import ctypes
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from allaprima.runtime.cuda import Device, Gpu, Graph

STREAM, CAPTURING = 7, 99


class LazyGpu(Gpu):
    """See above. `limit` is how many bytes of device memory there are."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self._scratch = None
        self.exclusive = threading.RLock()
        self.threads = {threading.get_ident()}
        self.queue: list[Callable[[], object]] = []
        self.captured: list[Callable[[], object]] | None = None
        self.limit, self.waits, self.launches, self.alive = limit, 0, 0, weakref.WeakSet[Any]()

    @property
    def device(self) -> Device:
        return Device("a GPU that is made up", "9.0")

    @property
    def stream(self) -> int:
        return STREAM

    def used(self) -> int:
        return sum(buffer.size for buffer in self.alive)

    def free_memory(self) -> tuple[int, int]:
        return self.limit - self.used(), self.limit

    def allocate(self, size: int) -> Any:
        with self._told(f"{size / 1e6:.0f} MB of device memory"):
            if size > self.free_memory()[0]:
                raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")
        buffer = Buffer(size)
        self.alive.add(buffer)
        self.enqueue(lambda: ctypes.memset(buffer.handle, 0, size))
        return buffer

    def pinned(self, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.full(size, 0xAA, np.uint8)

    def copy(self, target: int, source: int, size: int) -> None:
        self.enqueue(lambda: ctypes.memmove(target, source, size))

    def record(self) -> Callable[[], None]:
        mark = len(self.queue)
        return lambda: self._run(mark)

    def attach(self) -> None:
        self.threads.add(threading.get_ident())

    def synchronize(self) -> None:
        self.waits += 1
        self._run(len(self.queue))

    def capture(self, work: Callable[[int], bool]) -> Graph | None:
        self.captured = []
        done, captured = work(CAPTURING), self.captured
        self.captured = None
        return Graph(lambda: self._launch(captured)) if done else None

    def enqueue(self, work: Callable[[], object], stream: int = STREAM) -> None:
        assert threading.get_ident() in self.threads, "CUDA has no context in this thread"
        assert (stream == CAPTURING) == (self.captured is not None)
        (self.queue if self.captured is None else self.captured).append(work)

    def _launch(self, captured: list[Callable[[], object]]) -> None:
        self.launches += 1
        self.queue.extend(captured)

    def _run(self, end: int) -> None:
        for index in range(min(end, len(self.queue))):  # tests empty it, of what was done
            work, self.queue[index] = self.queue[index], lambda: None
            work()


class Buffer:
    def __init__(self, size: int) -> None:
        self.memory = np.full(size + 256, 0xCC, np.uint8)
        self.handle, self.size = -(-self.memory.ctypes.data // 256) * 256, size
