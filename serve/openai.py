"""OpenAI's Images API: what its clients speak, they can speak here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from PIL.Image import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from allaprima.bundle import RequestError
from allaprima.runtime import Parameters, Result
from allaprima.serve.context import Context, Here
from allaprima.serve.events import EventStream, event, listen
from allaprima.serve.failures import Envelope, Refusal, documented, failure_of, reply
from allaprima.serve.intake import body_schema, read_form, read_json
from allaprima.serve.jobs import Event, Job, Order
from allaprima.serve.openai_fields import (
    Edit,
    Generation,
    ModelCard,
    ModelCards,
    Painting,
    Picture,
    Pictures,
    Usage,
)
from allaprima.serve.uploads import read_alpha_mask, read_upload

router = APIRouter(tags=["OpenAI"])
_PAINTING = documented(400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503, 504, model=Envelope) | {
    200: {
        "model": Pictures,
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "description": "The pictures, or with `stream` the events by which they come.",
    }
}
_LISTING = documented(400, 401, 403, 404, 500, model=Envelope)


@router.post(
    "/v1/images/generations",
    responses=_PAINTING,
    response_model=None,
    openapi_extra=body_schema(Generation),
)
async def generate(request: Request, here: Here) -> Response:
    """Paint pictures after a prompt."""
    fields = await read_json(request, Generation)
    order = fields.order(here.studio.model(fields.model).manifest)
    return await _paint(request, here, fields, order, "image_generation")


@router.post(
    "/v1/images/edits",
    responses=_PAINTING,
    response_model=None,
    openapi_extra=body_schema(multipart=Edit, files=("image", "mask")),
)
async def edit(request: Request, here: Here) -> Response:
    """Paint over a picture: all of it as `strength` says, or where a mask is transparent."""
    fields, files = await read_form(
        request, Edit, ("image", "image[]", "mask"), repeated=("image", "image[]")
    )
    images = files.get("image", []) + files.get("image[]", [])
    if len(images) != 1:
        raise RequestError(f"there are {len(images)} images to paint over: send one, in the field image")
    most = here.settings.limits.upload_pixels
    image = await here.workers.run(read_upload, images[0], "image", most)
    mask = None
    if "mask" in files:
        mask = await here.workers.run(read_alpha_mask, files["mask"][0], "mask", most)
    order = fields.order(here.studio.model(fields.model).manifest, image, mask)
    return await _paint(request, here, fields, order, "image_edit")


async def _paint(request: Request, here: Context, fields: Painting, order: Order, kind: str) -> Response:
    job = await here.place(request, order)
    if fields.stream:
        events = _events(here, fields, job, await listen(job), kind)
        return EventStream(events, here.settings.heartbeat_seconds, left=job.cancel)
    result = await here.wait(request, job)
    made = result.parameters[0]
    pictures = Pictures(
        created=int(time.time()),
        output_format=fields.format,
        size=f"{made.width}x{made.height}",
        data=[
            await _picture(request, here, fields, image, parameters)
            for image, parameters in zip(result.images, result.parameters, strict=True)
        ],
    )
    return await here.workers.run(JSONResponse, pictures.model_dump(exclude_none=True))


async def _picture(
    request: Request, here: Context, fields: Painting, image: Image, parameters: Parameters
) -> Picture:
    data = await here.workers.encode(image, fields.format, parameters, quality=fields.output_compression)
    if fields.response_format == "url":
        url = f"{request.base_url}v1/files/images/{here.files.put(data, fields.format)}"
        return Picture(url=url, seed=parameters.seed)
    return Picture(b64_json=await here.workers.as_text(data), seed=parameters.seed)


async def _events(
    here: Context, fields: Painting, job: Job, heard: AsyncIterator[Event], kind: str
) -> AsyncIterator[bytes]:
    """Partial images while it is painted, then a completed event for each picture, or an error."""
    shown: Counter[int] = Counter()
    async for each in heard:
        if each.kind == "preview" and each.image and shown[each.index] < (fields.partial_images or 0):
            size = job.settings.width, job.settings.height  # previews are small, and shown in its place
            part = {"partial_image_index": shown[each.index], "image_index": each.index}
            shown[each.index] += 1
            yield await _event(here, fields, f"{kind}.partial_image", each.image, size, None, part)
    if job.result is None:
        failure = failure_of(job.failure or RuntimeError("a job ended with nothing"))
        # The envelope of an answer, which the client raises as an error.
        yield b"event: error\ndata: " + bytes(reply(failure, "/v1/").body) + b"\n\n"
        return
    async for completed in _completed(here, fields, job.result, kind):
        yield completed


async def _completed(here: Context, fields: Painting, result: Result, kind: str) -> AsyncIterator[bytes]:
    for index, (image, made) in enumerate(zip(result.images, result.parameters, strict=True)):
        extra = {"usage": Usage().model_dump(), "image_index": index, "seed": made.seed}
        yield await _event(here, fields, f"{kind}.completed", image, image.size, made, extra)


async def _event(
    here: Context,
    fields: Painting,
    name: str,
    image: Image,
    size: tuple[int, int],
    parameters: Parameters | None,
    extra: dict[str, Any],
) -> bytes:
    data = await here.workers.encode(
        image, fields.format, parameters, quality=fields.output_compression, size=size
    )
    body = {
        "type": name,
        "b64_json": await here.workers.as_text(data),
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": fields.format,
        "quality": fields.quality or "auto",
        "size": f"{size[0]}x{size[1]}",
    }
    return event(name, body | extra)


@router.get("/v1/models", responses=_LISTING)
async def models(here: Here) -> ModelCards:
    """The models that are served."""
    names = [model.name for model in here.studio.models()]
    return ModelCards(data=[ModelCard(id=name, created=here.started) for name in names])


@router.get("/v1/models/{id:path}", responses=_LISTING)
async def model(id: str, here: Here) -> ModelCard:
    """One model."""
    return ModelCard(id=here.studio.model(id).name, created=here.started)


@router.head("/v1/files/images/{name}", include_in_schema=False)
@router.get(
    "/v1/files/images/{name}",
    response_class=Response,
    responses=documented(400, 403, 404, 500, model=Envelope)
    | {200: {"content": {f"image/{kind}": {} for kind in ("png", "jpeg", "webp")}}},
)
async def file(name: str, here: Here) -> Response:
    """A picture that was handed out by URL."""
    found = here.files.get(name)
    if found is None:
        raise Refusal(404, "not_found", "there is no such picture, or it was kept long enough")
    return Response(found.data, media_type=f"image/{found.kind}")
