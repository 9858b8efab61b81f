"""Texts that were encoded before, so that a text encoder need neither run nor be loaded for them again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
Key = tuple[object, ...]


class EmbeddingCache:
    """What text encoders made of their inputs, in the host's memory, least recently used out first.

    A key is all that an encoder was given in one call: what it makes of a text may differ in the last bit
    when it is encoded together with another one.
    """

    def __init__(self, capacity: int) -> None:
        """`capacity` in bytes; 0 keeps nothing."""
        self.capacity = capacity
        self._kept: OrderedDict[Key, Arrays] = OrderedDict()
        self._size = 0

    def get(self, key: Key) -> Arrays | None:
        """What was made of it, not to be written to; None if it is not known."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: Key, arrays: Arrays) -> None:
        """Keep a copy of what was made, unless it is larger than the whole."""
        size = _size(arrays)
        if size > self.capacity:
            return
        self._size -= _size(self._kept.pop(key, {}))
        while self._size + size > self.capacity:
            _, dropped = self._kept.popitem(last=False)
            self._size -= _size(dropped)
        self._kept[key] = {name: array.copy() for name, array in arrays.items()}
        self._size += size

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._size = 0


def _size(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
