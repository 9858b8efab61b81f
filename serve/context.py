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
        note(request.scope, model=model.name)
        if self.settings.log_prompts:
            note(request.scope, prompt=order.request.prompt, negative_prompt=order.request.negative_prompt)
        job = await asyncio.to_thread(self.studio.submit, order)  # it looks at pictures
        made = job.settings
        note(
            request.scope,
            job=job.id,
            size=f"{made.width}x{made.height}",
            steps=made.num_inference_steps,
            images=made.num_images,
        )
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
            return waiting.result()
        finally:
            job.cancel()  # has no effect on one that has ended
            for task in (waiting, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


def context_of(request: Request) -> Context:
    """That of the application."""
    return cast(Context, request.app.state.context)


Here = Annotated[Context, Depends(context_of)]
"""The type of the parameter by which a route gets the context."""


async def _left(receive: Receive) -> None:
    """Return when the client has left. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
