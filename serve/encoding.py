"""Pictures as files, made off the event loop."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, ParamSpec, TypeVar

from PIL.Image import Image

from allaprima.runtime import Parameters, encode_image
from allaprima.serve.metrics import Metrics

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")

Format = Literal["png", "jpeg", "webp"]
_THREADS = 2
_PNG_LEVEL = 1
"""Of zlib: four times as fast as the default for files that are a tenth larger."""


class Workers:
    """A few threads for what would hold up the event loop: packing and unpacking pictures."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(_THREADS, "allaprima-pictures")

    async def run(
        self, work: Callable[Arguments, Value], *args: Arguments.args, **options: Arguments.kwargs
    ) -> Value:
        """Do something there. Raises what it raises."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: work(*args, **options))

    async def encode(
        self,
        image: Image,
        kind: Format,
        parameters: Parameters | None = None,
        *,
        quality: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> bytes:
        """A picture as a file, with its parameters in it; before that resized to `size`, width and height."""
        return await self.run(self._encode, image, kind, parameters, quality, size)

    async def as_text(self, data: bytes) -> str:
        """A file in base64."""
        return (await self.run(base64.b64encode, data)).decode()

    def _encode(
        self,
        image: Image,
        kind: Format,
        parameters: Parameters | None,
        quality: int | None,
        size: tuple[int, int] | None,
    ) -> bytes:
        begun = time.perf_counter()
        shown = image if size is None or image.size == size else image.resize(size)
        data = encode_image(shown, kind.upper(), parameters, quality=quality, compress_level=_PNG_LEVEL)
        self._metrics.filed(kind, time.perf_counter() - begun)
        return data

    def close(self) -> None:
        """Let go of the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
