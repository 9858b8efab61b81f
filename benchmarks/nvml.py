"""Device memory, the same way for every contestant: what the driver says is in use, with nothing of theirs.

The driver's library (NVML) needs no context on the device, so asking adds nothing to what is measured.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

PAUSE = 0.05
"""Seconds between two looks."""


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def used_memory() -> int | None:
    """Bytes in use on all NVIDIA devices together, by anybody; None where the driver does not tell."""
    library = _open()
    if library is None:
        return None
    count = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return None
    used = 0
    for index in range(count.value):
        device, memory = ctypes.c_void_p(), _Memory()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
            return None
        if library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)):
            return None
        used += memory.used
    return used


@functools.cache
def _open() -> Any:
    """The driver's library, initialised; None without one."""
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library


class PeakDevice:
    """How much more is in use than at the start, at most, until the end of the block: a thread looks."""

    def __init__(self, read: Callable[[], int | None] = used_memory) -> None:
        self._read, self._ended = read, threading.Event()
        self._before, self._most = read(), 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(PAUSE):
            self._look()

    def _look(self) -> None:
        if self._before is not None and (now := self._read()) is not None:
            self._most = max(self._most, now - self._before)

    def peak(self) -> int | None:
        """In bytes, until now; None where it cannot be known."""
        self._look()
        return None if self._before is None else self._most

    def __enter__(self) -> Self:
        """Begin to look."""
        if self._before is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Look no more."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
