"""What the routes share, and how they hand orders to the studio."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, cast

from fastapi import Depends
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from allaprima.runtime import Result
from allaprima.serve.encoding import Workers
from allaprima.serve.files import Files
from allaprima.serve.jobs import Job, Order
from allaprima.serve.keys import owner_of
from allaprima.serve.metrics import Metrics
from allaprima.serve.notes import note
from allaprima.serve.settings import ServerSettings
from allaprima.serve.studio import Studio


@dataclass(frozen=True)
class Context:
    """One for each application, in `app.state.context`. `started` is in seconds since the epoch."""

    studio: Studio
    settings: ServerSettings
    metrics: Metrics
    workers: Workers
    files: Files
    started: int

    async def place(self, request: Request, order: Order) -> Job:
        """Hand in an order for whoever sent a request, and note what is known of it.

        A model that has no previews is not asked for them. Raises as `Studio.submit`.
        """
        model = self.studio.model(order.model)
        every = order.preview_every if model.manifest.preview is not None else None
        order = replace(order, preview_every=every, owner=owner_of(request))
        asked = order.request
        note(request.scope, model=model.name, steps=asked.num_inference_steps, images=asked.num_images)
        if asked.width is not None and asked.height is not None:
            note(request.scope, size=f"{asked.width}x{asked.height}")
        if self.settings.log_prompts:
            note(request.scope, prompt=asked.prompt, negative_prompt=asked.negative_prompt)
        # On a thread: texts are counted there, and pictures looked at.
        job = await self.workers.run(self.studio.submit, order)
        note(request.scope, job=job.id)
        return job

    def find(self, request: Request, id: str) -> Job | None:
        """A job of whoever sent a request; those of others are not there."""
        job = self.studio.job(id)
        return job if job is not None and job.order.owner == owner_of(request) else None

    async def wait(self, request: Request, job: Job) -> Result:
        """The result of a job that lives only as long as the client waits for it.

        Raises what the job failed with, or ClientDisconnect.
        """
        waiting = asyncio.ensure_future(job.wait())
        leaving = asyncio.ensure_future(_left(request.receive))
        try:
            await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ClientDisconnect
            result = waiting.result()
        finally:
            job.cancel()  # has no effect on one that has ended
            for task in (waiting, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
        note_result(request, result)
        return result


def note_result(request: Request, result: Result) -> None:
    """Note how the pictures were made, which the bundle may have decided."""
    if result.parameters:
        made = result.parameters[0]
        note(request.scope, size=f"{made.width}x{made.height}", steps=made.num_inference_steps)


def context_of(request: Request) -> Context:
    """That of the application."""
    return cast(Context, request.app.state.context)


Here = Annotated[Context, Depends(context_of)]
"""The type of the parameter by which a route gets the context."""


async def _left(receive: Receive) -> None:
    """Return when the client has left. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
