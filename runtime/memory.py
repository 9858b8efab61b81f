"""Where tensors live: arrays of the host, and behind them the memory of a device where there is one.

A block is a few tensors that travel together. Its arrays are the host's to write and to read; `push` hands
their present contents to the device, `pull` brings back what the device made of them. On a CPU the arrays are
all there is, and both do nothing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

Layout = Mapping[str, tuple[tuple[int, ...], DTypeLike]]
"""Shape and element type of each tensor of a block."""


@dataclass(frozen=True, eq=False)
class Tensor:
    """An array of the host, C-contiguous, and the address at which a backend finds the same tensor.

    `address` is in the memory that the tensor was allocated from: the array's own on a CPU, else the
    device's; `owner` is what keeps that memory, if it is not the array.
    """

    array: NDArray[Any]
    address: int
    owner: object = None

    @classmethod
    def on_host(cls, array: NDArray[Any]) -> Self:
        """The tensor that an array of the host is."""
        return cls(array, array.ctypes.data)

    def reshape(self, *shape: int) -> Tensor:
        """The same memory in another shape."""
        return Tensor(self.array.reshape(shape), self.address, self.owner)

    def __getitem__(self, index: int | tuple[int, ...]) -> Tensor:
        """A part, by its indices along the first axes: the same memory."""
        part = self.array[index]
        offset = int(part.ctypes.data) - int(self.array.ctypes.data)
        return Tensor(part, self.address + offset, self.owner)


class Block(Protocol):
    """Tensors that were allocated together, all zero at first."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By name."""

    def push(self) -> None:
        """Hand the arrays' present contents to the device, in order with its work.

        Returns at once; the arrays may be written again. Raises BackendError.
        """

    def pull(self) -> None:
        """Bring the device's contents into the arrays, after everything that was asked of it before.

        Raises BackendError.
        """


class Memory(Protocol):
    """The memory that a session's tensors must lie in."""

    def allocate(self, layout: Layout) -> Block:
        """A block of zeros. Raises BackendError with what was asked and what is free."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy a tensor of this memory to another of the same shape and type, in order with its work.

        The arrays are left alone where there is a device.
        """

    def synchronize(self) -> None:
        """Wait for everything that was asked of it. Raises BackendError if any of it failed."""

    def attach(self) -> None:
        """Let this thread ask for work, whichever thread opened the session. Raises BackendError."""


class HostMemory:
    """The memory of the process: see Memory."""

    def allocate(self, layout: Layout) -> HostBlock:
        """See Memory.allocate."""
        return HostBlock(
            {name: Tensor.on_host(np.zeros(shape, dtype)) for name, (shape, dtype) in layout.items()}
        )

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See Memory.copy."""
        target.array[...] = source.array

    def synchronize(self) -> None:
        """Nothing to do: what was asked is done."""

    def attach(self) -> None:
        """Nothing to do: every thread can compute."""


@dataclass(frozen=True)
class HostBlock:
    """See Block."""

    tensors: Mapping[str, Tensor]

    def push(self) -> None:
        """Nothing to do: the arrays are what the backend reads."""

    def pull(self) -> None:
        """Nothing to do: the arrays are what the backend writes."""


HOST = HostMemory()


def trim() -> None:
    """Give memory that was freed back to the system, where the C library keeps it.

    glibc keeps what lies between blocks that are in use, and raises the size above which it does not to that
    of every block that is freed: after ONNX Runtime let go of weights of a few megabytes each, all of them
    stay with the process.
    """
    if sys.platform == "linux":
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if give_back is not None:
            give_back(0)


def on_host(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Arrays of the host as tensors, to bind to a session of a CPU backend."""
    return {name: Tensor.on_host(array) for name, array in arrays.items()}
