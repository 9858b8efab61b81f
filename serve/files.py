"""Pictures that are handed out by URL, in memory and for a while."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from allaprima.serve.encoding import Format


@dataclass(frozen=True)
class File:
    """The contents, and when they are forgotten."""

    data: bytes
    kind: Format
    until: float


class Files:
    """At most `count`, of `size` bytes together, for `seconds` each; the oldest go first.

    A name is a random number of 192 bits: who knows it was told it, so it needs no key.
    """

    def __init__(
        self, count: int, size: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._count, self._size, self._seconds, self._clock = count, size, seconds, clock
        self._files: OrderedDict[str, File] = OrderedDict()
        self._held = 0

    def put(self, data: bytes, kind: Format) -> str:
        """Keep a file; its name."""
        name = f"{secrets.token_urlsafe(24)}.{kind}"
        self._files[name] = File(data, kind, self._clock() + self._seconds)
        self._held += len(data)
        self._forget()
        return name

    def get(self, name: str) -> File | None:
        """A file, if it is still there."""
        self._forget()
        return self._files.get(name)

    def _forget(self) -> None:
        now = self._clock()
        while self._files:
            oldest = next(iter(self._files.values()))
            over = len(self._files) > self._count or (self._held > self._size and len(self._files) > 1)
            if oldest.until > now and not over:
                return
            self._files.popitem(last=False)
            self._held -= len(oldest.data)
