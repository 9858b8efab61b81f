"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from allaprima.serve.jobs import Event, Job

_BEAT = b": keep-alive\n\n"


def event(name: str, data: object) -> bytes:
    """One event."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=True)}\n\n".encode("ascii")


class EventStream(StreamingResponse):
    """Sends events until there are no more or the client leaves, and calls `left` in both cases.

    In a silence of `heartbeat` seconds a comment is sent, so that nothing on the way gives the connection up.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], heartbeat: float, left: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(_with_beats(events, heartbeat), headers={"x-accel-buffering": "no"})
        self._left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left()


async def listen(job: Job) -> AsyncIterator[Event]:
    """The events of a job from now on, and not only from when the first is asked for."""
    events = job.events()
    first = await anext(events)

    async def all_of_them() -> AsyncIterator[Event]:
        yield first
        async for each in events:
            yield each

    return all_of_them()


async def _with_beats(events: AsyncIterator[bytes], seconds: float) -> AsyncIterator[bytes]:
    coming = asyncio.ensure_future(_next(events))
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=seconds)
            if not done:
                yield _BEAT
                continue
            found = coming.result()
            if found is None:
                return
            yield found
            coming = asyncio.ensure_future(_next(events))
    finally:
        if not coming.done():
            coming.cancel()
            with suppress(asyncio.CancelledError):
                await coming


async def _next(events: AsyncIterator[bytes]) -> bytes | None:
    return await anext(events, None)
