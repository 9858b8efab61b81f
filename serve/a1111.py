"""The part of the API of AUTOMATIC1111's web UI that paints, for the clients that speak it."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from PIL.Image import Image
from pydantic import RootModel
from starlette.requests import Request

from allaprima.serve import a1111_lists
from allaprima.serve.a1111_answers import Painted, Progress, info_of, state_of, told
from allaprima.serve.a1111_fields import Img2Img, Txt2Img, chosen_model, model_of, read_request
from allaprima.serve.context import Context, Here
from allaprima.serve.failures import Detail, documented
from allaprima.serve.intake import body_schema, read_json
from allaprima.serve.jobs import Job, Order
from allaprima.serve.keys import owner_of

PREVIEW_EVERY = 5
"""Calls of the model from preview to preview: nobody can say beforehand whether one will be asked for."""
_PAINTING = documented(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504, model=Detail)
_CHOOSING = documented(400, 401, 403, 404, 408, 413, 415, 422, 500, model=Detail)


class Options(RootModel[dict[str, Any]]):
    """Any options; those that there are not have no effect."""


@dataclass(eq=False)
class Task:
    """One request that is painted; `begun` by the monotonic clock."""

    owner: str | None
    job: Job
    begun: float
    preview: Image | None = None

    async def watch(self) -> None:
        """Keep the newest preview of its first picture, until the job ends."""
        async for event in self.job.events():
            if event.kind == "preview" and event.index == 0:
                self.preview = event.image


class WebUI:
    """The routes, and what they remember: what is painted by them, and which model each owner chose."""

    def __init__(self) -> None:
        self._tasks: list[Task] = []
        self._chosen: dict[str | None, str] = {}

    def router(self) -> APIRouter:
        """All of them; those of lists are in `a1111_lists`."""
        router = APIRouter(prefix=a1111_lists.PREFIX, tags=[a1111_lists.TAG])
        post: dict[str, Any] = {"methods": ["POST"]}
        get: dict[str, Any] = {"methods": ["GET"], "responses": a1111_lists.LISTING}
        for path, paint, fields in (("/txt2img", self.txt2img, Txt2Img), ("/img2img", self.img2img, Img2Img)):
            schema = body_schema(fields)
            router.add_api_route(path, paint, **post, responses=_PAINTING, openapi_extra=schema)
        schema = body_schema(Options)
        router.add_api_route("/options", self.choose, **post, responses=_CHOOSING, openapi_extra=schema)
        for path in ("/interrupt", "/skip"):
            router.add_api_route(path, self.interrupt, **post, responses=a1111_lists.LISTING, name=path[1:])
        router.add_api_route("/options", self.options, **get)
        router.add_api_route("/progress", self.progress, **get)
        return router

    async def txt2img(self, request: Request, here: Here) -> Painted:
        """Paint pictures after a prompt."""
        return await self._paint(request, here, await read_json(request, Txt2Img, strict=False))

    async def img2img(self, request: Request, here: Here) -> Painted:
        """Paint over a picture."""
        return await self._paint(request, here, await read_json(request, Img2Img, strict=False))

    async def _paint(self, request: Request, here: Context, fields: Txt2Img) -> Painted:
        name = chosen_model(fields) or self._chosen.get(owner_of(request))
        model = here.studio.model(name)
        most = here.settings.limits.upload_pixels
        asked = await here.workers.run(read_request, fields, model.manifest, most)
        job = await here.place(request, Order(asked, model.name, PREVIEW_EVERY))
        task = Task(owner_of(request), job, time.monotonic())
        self._tasks.append(task)
        watching = asyncio.ensure_future(task.watch())
        try:
            result = await here.wait(request, job)
        finally:
            self._tasks.remove(task)
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        images = [
            await here.workers.as_text(await here.workers.encode(image, "png", parameters))
            for image, parameters in zip(result.images, result.parameters, strict=True)
            if fields.send_images
        ]
        return Painted(images=images, parameters=told(fields), info=info_of(fields, result))

    def _current(self, request: Request) -> Task | None:
        """The oldest task of whoever sent a request: that API knows one at a time."""
        owner = owner_of(request)
        return next((task for task in self._tasks if task.owner == owner), None)

    async def progress(self, request: Request, here: Here, skip_current_image: bool = False) -> Progress:
        """How far the caller's oldest painting is."""
        task = self._current(request)
        if task is None:
            return Progress(progress=0, eta_relative=0, state=state_of(None))
        share, passed = task.job.status.progress, time.monotonic() - task.begun
        image = None
        if task.preview is not None and not skip_current_image:
            image = await here.workers.as_text(await here.workers.encode(task.preview, "png"))
        left = passed / share - passed if share else 0.0
        return Progress(progress=share, eta_relative=left, state=state_of(task.job), current_image=image)

    async def interrupt(self, request: Request) -> dict[str, Any]:
        """Stop the painting that `progress` tells of."""
        task = self._current(request)
        if task is not None:
            task.job.cancel()
        return {}

    async def options(self, request: Request, here: Here) -> dict[str, Any]:
        """The options that there are."""
        chosen = here.studio.model(self._chosen.get(owner_of(request))).name
        return {
            "sd_model_checkpoint": chosen,
            "sd_checkpoint_hash": "",
            "sd_vae": "Automatic",
            "CLIP_stop_at_last_layers": 1,
            "samples_format": "png",
            "show_progress_every_n_steps": PREVIEW_EVERY,
        }

    async def choose(self, request: Request, here: Here) -> None:
        """Choose the model of later requests with the same key; other options have no effect."""
        options = (await read_json(request, Options, strict=False)).root
        name = options.get("sd_model_checkpoint")
        if name is not None:
            self._chosen[owner_of(request)] = here.studio.model(model_of(str(name))).name
