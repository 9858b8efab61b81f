"""What orchestrators and Prometheus ask."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from allaprima.serve.context import Here
from allaprima.serve.failures import Detail, documented

router = APIRouter(tags=["Operation"])


class Health(BaseModel):
    """`status` is live or ready, starting (also while it drains), or failed."""

    status: Literal["live", "ready", "starting", "failed"]


_UNWELL = {503: {"model": Health, "description": "Not so"}} | documented(403, model=Detail)


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", response_model=Health, responses=_UNWELL)
async def live(here: Here) -> Response:
    """Whether the process can still paint; if not, it should be started anew."""
    return _say("live") if here.studio.failure is None else _say("failed", 503)


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready", response_model=Health, responses=_UNWELL)
async def ready(here: Here) -> Response:
    """Whether it is warmed up and takes orders."""
    if here.studio.failure is not None:
        return _say("failed", 503)
    return _say("ready") if here.studio.ready else _say("starting", 503)


@router.get(
    "/metrics",
    response_class=Response,
    responses=documented(401, 403, model=Detail)
    | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(here: Here) -> Response:
    """For Prometheus."""
    return Response(here.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _say(status: Literal["live", "ready", "starting", "failed"], code: int = 200) -> Response:
    return JSONResponse(Health(status=status).model_dump(), code)
