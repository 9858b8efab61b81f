"""Our own API: jobs that are handed in, watched, cancelled and fetched."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from allaprima.runtime import samplers
from allaprima.serve.context import Context, Here
from allaprima.serve.encoding import Format
from allaprima.serve.events import EventStream, event, listen
from allaprima.serve.failures import Detail, Refusal, documented
from allaprima.serve.intake import Files, body_schema, kind_of, read_form, read_json, wrong_kind
from allaprima.serve.jobs import Event, Job, Status
from allaprima.serve.native_fields import (
    PICTURES,
    FormFields,
    JobFields,
    JobList,
    JobStatus,
    ModelInfo,
    SamplerCard,
)
from allaprima.serve.uploads import decode_base64, read_upload

router = APIRouter(prefix="/api", tags=["Jobs"])
_COMMON = documented(401, 403, 404, 422, 500, model=Detail)
_SUBMITTING = documented(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, model=Detail)


@router.post(
    "/jobs",
    status_code=202,
    response_model=JobStatus,
    responses=_SUBMITTING,
    openapi_extra=body_schema(JobFields, multipart=FormFields, files=PICTURES),
)
async def submit(request: Request, here: Here) -> Response:
    """Hand in a job, as JSON with pictures in base64, or as a form with pictures as files."""
    fields, files = await _read(request, here)
    most = here.settings.limits.upload_pixels
    pictures = {
        name: await here.workers.run(read_upload, contents[0], name, most) for name, contents in files.items()
    }
    job = await here.place(request, fields.order(pictures))
    status = JobStatus.of(job).model_dump()
    return JSONResponse(status, 202, {"location": f"/api/jobs/{job.id}"})


async def _read(request: Request, here: Context) -> tuple[FormFields, Files]:
    kind = kind_of(request)
    if kind == "multipart/form-data":
        return await read_form(request, FormFields, PICTURES)
    if kind != "application/json":
        raise wrong_kind(request, "application/json", "multipart/form-data")
    fields = await read_json(request, JobFields)
    given = {name: getattr(fields, name) for name in PICTURES}
    files = {
        name: [await here.workers.run(decode_base64, text, name)]
        for name, text in given.items()
        if text is not None
    }
    return fields, files


@router.get("/jobs", responses=_COMMON)
async def jobs(request: Request, here: Here) -> JobList:
    """The sender's jobs that wait or run."""
    load = here.studio.load()
    mine = [job for job in here.studio.jobs() if here.find(request, job.id) is job]
    return JobList(jobs=[JobStatus.of(job) for job in mine], queued=load.queued, running=load.running)


@router.get("/jobs/{id}", responses=_COMMON)
async def status(id: str, request: Request, here: Here) -> JobStatus:
    """How far a job is, and how its pictures were made."""
    return JobStatus.of(_find(request, here, id))


@router.delete("/jobs/{id}", responses=_COMMON)
async def cancel(id: str, request: Request, here: Here) -> JobStatus:
    """Stop a job before its next step; has no effect on one that has ended."""
    job = _find(request, here, id)
    job.cancel()
    return JobStatus.of(job)


@router.get(
    "/jobs/{id}/images/{index}",
    response_class=Response,
    responses=_COMMON
    | documented(409, model=Detail)
    | {200: {"content": {f"image/{kind}": {} for kind in ("png", "jpeg", "webp")}}},
)
async def image(
    id: str, index: Annotated[int, Path(ge=0)], request: Request, here: Here, format: Format = "png"
) -> Response:
    """One picture of a job that is done, counted from 0, with its parameters in the file."""
    job = _find(request, here, id)
    if job.result is None:
        raise Refusal(409, "not_done", f"the job is {job.status.state}: there are pictures when it is done")
    if index >= len(job.result.images):
        raise Refusal(404, "not_found", f"the job has {len(job.result.images)} pictures, counted from 0")
    made = job.result.parameters[index]
    data = await here.workers.encode(job.result.images[index], format, made)
    name = f"allaprima-{made.seed}.{format}"
    return Response(
        data, media_type=f"image/{format}", headers={"content-disposition": f'inline; filename="{name}"'}
    )


@router.get(
    "/jobs/{id}/events",
    response_class=StreamingResponse,
    responses=_COMMON | {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def events(id: str, request: Request, here: Here) -> Response:
    """What happens to a job from now on: events `status`, `preview`, and at last `ended`.

    Whoever listens, or stops to, has no effect on the job.
    """
    job = _find(request, here, id)
    return EventStream(_events(here, job, await listen(job)), here.settings.heartbeat_seconds)


async def _events(here: Context, job: Job, heard: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    async for each in heard:
        if each.kind == "preview" and each.image is not None:
            data = await here.workers.as_text(await here.workers.encode(each.image, "png"))
            yield event("preview", {"index": each.index, "image": f"data:image/png;base64,{data}"})
        else:
            yield event(each.kind, _shown(job, each.status))


def _shown(job: Job, status: Status) -> dict[str, object]:
    return JobStatus.of(job, status).model_dump()


@router.get("/models", responses=_COMMON)
async def models(here: Here) -> list[ModelInfo]:
    """The models that are served, the default one first."""
    return [
        ModelInfo.of(
            model.manifest, here.studio.limits, name=model.name, default=index == 0, loaded=model.loaded
        )
        for index, model in enumerate(here.studio.models())
    ]


@router.get("/samplers", responses=_COMMON)
async def known_samplers() -> list[SamplerCard]:
    """The samplers, the plain form of each before its variants."""
    return [
        SamplerCard(
            name=info.name,
            title=info.title,
            aliases=list(info.aliases),
            description=info.description,
            calls=info.calls,
            noise=info.noise,
            history=info.history,
            arguments=list(info.arguments),
        )
        for info in samplers.names()
    ]


def _find(request: Request, here: Context, id: str) -> Job:
    job = here.find(request, id)
    if job is None:
        raise Refusal(404, "not_found", "there is no such job, or it ended too long ago")
    return job
