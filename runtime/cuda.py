"""One NVIDIA GPU through `cuda.core`: memory, copies, events and graphs, all on one stream.

Everything lives in the device's primary context, which TensorRT, ONNX Runtime, torch and CuPy use too. The
module imports without a driver; `Gpu` is where one is needed.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allaprima.bundle import BackendError
from allaprima.runtime.memory import Layout, Tensor

ALIGNMENT = 256
"""Bytes; every tensor begins at a multiple, as TensorRT asks of its scratch area and likes of all."""
_NO_DRIVER = "its driver is not installed"
IN_FLIGHT = 1 << 20
"""Bytes of pinned copies of a block that may be on their way at once; two at least, whatever their size."""
SLOTS = 8
"""Copies of a block at most, and so steps that the host may be ahead of the device."""


@dataclass(frozen=True)
class Device:
    """A GPU in words: its name, and its compute capability as in "8.9"."""

    name: str
    capability: str

    def __str__(self) -> str:
        """As in the key of an engine: engines for one may not fit another."""
        return f"{self.name}, compute capability {self.capability}"


def current_device() -> Device:
    """The device that CUDA would use in this thread. Raises BackendError if there is none."""
    try:
        from cuda.core import Device as CoreDevice
    except ImportError as cause:
        raise BackendError(
            f"NVIDIA GPUs need cuda-core ({cause}): pip install cuda-core cuda-bindings"
        ) from cause
    try:
        device: Any = CoreDevice()
        major, minor = device.compute_capability
        return Device(str(device.name), f"{major}.{minor}")
    except Exception as cause:  # the driver's absence and its failures come in many kinds
        raise BackendError(
            f"no NVIDIA GPU works here ({_first_line(cause)}): install its driver, or compile where one works"
        ) from cause


class Graph:
    """Work that was captured once, to be enqueued as a whole."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self.launch = launch


class Gpu:
    """A device with one stream, in order.

    Args:
        index: which device.
        stream: a foreign stream to work on: its integer handle, or an object with `__cuda_stream__` (torch,
            CuPy, cuda.core) or `handle` (PyCUDA). It must be of the primary context. None makes one.

    Raises:
        BackendError: cuda.core is not installed, there is no driver, it is too old, or no such device.
    """

    def __init__(self, index: int = 0, stream: object | None = None) -> None:
        try:
            from cuda.bindings import driver
            from cuda.core import Device as CoreDevice
            from cuda.core import Stream, StreamOptions
        except ImportError as cause:
            raise BackendError(
                f"NVIDIA GPUs need cuda-core ({cause}): pip install cuda-core cuda-bindings"
            ) from cause
        self._driver: Any = driver
        try:
            self._device: Any = CoreDevice(index)
            self._device.set_current()
            if stream is None:
                self._stream: Any = self._device.create_stream(options=StreamOptions(nonblocking=True))
            elif hasattr(stream, "__cuda_stream__"):
                self._stream = self._device.create_stream(stream)
            else:
                self._stream = Stream.from_handle(int(getattr(stream, "handle", stream)))  # type: ignore[call-overload]
        except Exception as cause:  # the loader of libcuda and the driver have their own kinds
            raise BackendError(f"no NVIDIA GPU works here: {_first_line(cause)}") from cause
        self._scratch: Any = None
        self.exclusive = threading.RLock()
        """Held by whoever enqueues: of two threads' work, one goes first, whole.

        While one of them captures a graph, what another enqueued would become a part of it, and what another
        allocated would break it.
        """

    @property
    def device(self) -> Device:
        """What it is."""
        major, minor = self._device.compute_capability
        return Device(str(self._device.name), f"{major}.{minor}")

    @property
    def stream(self) -> int:
        """The handle of the stream that all work is enqueued on."""
        return int(self._stream.handle)

    def free_memory(self) -> tuple[int, int]:
        """Bytes of device memory that are free, and all there are."""
        free, total = self._checked(self._driver.cuMemGetInfo())
        return int(free), int(total)

    def allocate(self, size: int) -> Any:
        """`size` bytes of zeros on the device; `handle` is the address. Freed when it is dropped.

        Raises BackendError with what was asked and what is free.
        """
        with self.exclusive, self._told(f"{size / 1e6:.0f} MB of device memory"):
            buffer = self._device.allocate(max(size, 1), stream=self._stream)
            buffer.fill(0, stream=self._stream)
            return buffer

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """`size` bytes of page-locked host memory, which copies to and from the device need to be fast."""
        from cuda.core import LegacyPinnedMemoryResource

        with self.exclusive, self._told(f"{size / 1e6:.0f} MB of pinned host memory"):
            buffer: Any = LegacyPinnedMemoryResource().allocate(max(size, 1))
        memory: Any = (ctypes.c_uint8 * size).from_address(int(buffer.handle))
        memory.owner = buffer  # the array keeps `memory`, and so the buffer
        array: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        return array

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy between any two addresses, of the device or of pinned memory."""
        with self.exclusive:
            self._checked(self._driver.cuMemcpyAsync(target, source, size, self.stream))

    def record(self) -> Callable[[], None]:
        """Mark this place in the stream; the result waits until it is reached."""
        with self.exclusive:
            event = self._stream.record()

        def wait() -> None:
            with self._apart():
                event.sync()

        return wait

    def mark(self) -> Any:
        """Mark this place in the stream with its time, for `seconds`."""
        from cuda.core import EventOptions

        with self.exclusive:
            return self._stream.record(options=EventOptions(timing_enabled=True))

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two marks, which must have been reached: see `synchronize`."""
        return float(end - begin) / 1000

    def synchronize(self) -> None:
        """Wait for everything. Raises BackendError if any of it failed."""
        with self._told("the GPU's work"):
            self.record()()  # and not the stream itself, which must be left alone while it is captured

    def attach(self) -> None:
        """Make its context that of this thread, since CUDA has one for each. Raises BackendError."""
        with self._told("choosing the GPU"):
            self._device.set_current()

    def scratch(self, size: int) -> int:
        """The address of one area of at least `size` bytes that all engines share, as only one runs at once.

        It moves when it grows.
        """
        if self._scratch is None or self._scratch.size < size:
            self._scratch = None  # first, so that the old and the new area need not fit together
            self._scratch = self.allocate(size)
        return int(self._scratch.handle)

    def capture(self, work: Callable[[int], bool]) -> Graph | None:
        """What `work` enqueues on the stream that it is given, as a graph; None if it cannot be captured.

        `work` must have run once before, outside; it says whether all its calls succeeded.
        """
        builder: Any = self._stream.create_graph_builder()
        try:
            builder.begin_building("thread_local")
            try:
                done = work(int(builder.stream.handle))
            finally:
                builder.end_building()
            if not done:
                return None
            graph: Any = builder.complete()
            graph.upload(self._stream)
        except Exception:  # an invalidated capture: the caller goes on without a graph
            return None
        return Graph(lambda: graph.launch(self._stream))

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Let this thread wait while another captures a graph: by default that would fail, and break both."""
        exchange = self._driver.cuThreadExchangeStreamCaptureMode
        before = self._checked(exchange(self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
        try:
            yield
        finally:
            self._checked(exchange(before))

    def _checked(self, result: tuple[Any, ...]) -> Any:
        """The values that a call of the driver returns after its status. Raises BackendError."""
        status, *values = result
        if int(status) != 0:
            raise BackendError(f"CUDA failed: {status.name}")
        return values[0] if len(values) == 1 else values

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as cause:
            if "OUT_OF_MEMORY" not in str(cause):
                raise BackendError(f"CUDA failed at {what}: {_first_line(cause)}") from cause
            free, total = self.free_memory()
            raise BackendError(
                f"out of memory: {what} asked for, {free / 1e6:.0f} MB of {total / 1e6:.0f} MB free. Lower "
                "num_images or the size, or end what else uses the GPU"
            ) from cause


_default: Gpu | None = None


def default_gpu() -> Gpu:
    """The GPU with the stream and scratch area that all sessions of the process share.

    The first of the machine, unless `use` named another. Raises BackendError.
    """
    global _default
    if _default is None:
        _look_for_driver()
        _default = Gpu()
    return _default


def _look_for_driver() -> None:
    """Raises BackendError if there is none, in a hundredth of the time that importing cuda.core takes."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as cause:
        raise BackendError(f"no NVIDIA GPU works here: {_NO_DRIVER}") from cause


def use(gpu: Gpu) -> None:
    """Make this the GPU of all sessions that are opened from now on, for a stream of one's own."""
    global _default
    _default = gpu


class CudaMemory:
    """The memory of a GPU: see `memory.Memory`."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def allocate(self, layout: Layout) -> CudaBlock:
        """See Memory.allocate."""
        return CudaBlock(self._gpu, layout)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See Memory.copy."""
        self._gpu.copy(target.address, source.address, source.array.nbytes)

    def synchronize(self) -> None:
        """See Memory.synchronize."""
        self._gpu.synchronize()

    def attach(self) -> None:
        """See Memory.attach."""
        self._gpu.attach()


class CudaBlock:
    """See `memory.Block`: one allocation on the device, one in the host, and pinned slots between them.

    A push copies the arrays to the next slot and enqueues its copy to the device, so the arrays are free at
    once; it waits only if all slots are still on their way.
    """

    def __init__(self, gpu: Gpu, layout: Layout) -> None:
        offsets, size = _place(layout)
        self._gpu, self._size = gpu, size
        self._buffer = gpu.allocate(size)
        self._host = np.zeros(size, np.uint8)
        self._slots: list[NDArray[np.uint8]] = []
        self._owner = self._buffer, self._slots  # a copy from a slot may be on its way when the block goes
        self._waits: list[Callable[[], None]] = []
        self._next = 0
        self.tensors: Mapping[str, Tensor] = {
            name: self._tensor(offsets[name], shape, np.dtype(dtype))
            for name, (shape, dtype) in layout.items()
        }

    def _tensor(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        array = self._host[offset : offset + size].view(dtype).reshape(shape)
        return Tensor(array, int(self._buffer.handle) + offset, self._owner)

    def push(self) -> None:
        """See Block.push."""
        slot = self._slot()
        slot[...] = self._host
        self._gpu.copy(int(self._buffer.handle), slot.ctypes.data, self._size)
        self._waits[self._next] = self._gpu.record()
        self._next = (self._next + 1) % len(self._slots)

    def pull(self) -> None:
        """See Block.pull."""
        slot = self._slot()
        self._gpu.copy(slot.ctypes.data, int(self._buffer.handle), self._size)
        self._gpu.synchronize()
        self._host[...] = slot

    def _slot(self) -> NDArray[np.uint8]:
        """The next slot, once nothing uses it. All of them are one allocation, which takes long."""
        if not self._slots:
            count = min(SLOTS, max(2, IN_FLIGHT // max(self._size, 1)))
            self._slots.extend(self._gpu.pinned(count * self._size).reshape(count, self._size))
            self._waits = [lambda: None] * count
        self._waits[self._next]()
        return self._slots[self._next]


def _place(layout: Layout) -> tuple[dict[str, int], int]:
    """Where each tensor begins, and the bytes of all."""
    offsets, size = {}, 0
    for name, (shape, dtype) in layout.items():
        offsets[name] = size
        size += int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        size = -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, size


def _first_line(cause: BaseException) -> str:
    if type(cause).__name__ == "DynamicLibNotFoundError":
        return _NO_DRIVER
    return (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
