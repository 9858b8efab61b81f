"""The HTTP application."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from allaprima.bundle import VERSION, AllaprimaError
from allaprima.serve import a1111_lists, health, native, openai
from allaprima.serve.a1111 import WebUI
from allaprima.serve.context import Context
from allaprima.serve.door import Door
from allaprima.serve.encoding import Workers
from allaprima.serve.failures import failure_of, reply
from allaprima.serve.files import Files
from allaprima.serve.intake import BodyLimit
from allaprima.serve.keys import Guard, check_keys
from allaprima.serve.metrics import Metrics
from allaprima.serve.notes import note
from allaprima.serve.page_routes import page_router
from allaprima.serve.settings import ServerSettings
from allaprima.serve.studio import Studio

_CLOSE_SECONDS = 30.0


def create_app(
    studio: Studio, settings: ServerSettings | None = None, metrics: Metrics | None = None
) -> FastAPI:
    """The application over a studio, which it starts and closes.

    `metrics` are those that the studio reports to. Raises RequestError for an API key that cannot be one.
    """
    settings = ServerSettings() if settings is None else settings
    check_keys(settings.api_keys)
    metrics = Metrics() if metrics is None else metrics
    metrics.follow(studio.load)
    context = Context(
        studio=studio,
        settings=settings,
        metrics=metrics,
        workers=Workers(metrics),
        files=Files(settings.files, settings.files_bytes, settings.files_seconds),
        started=int(time.time()),
    )
    app = FastAPI(
        title="Allaprima",
        version=VERSION,
        lifespan=_lifespan,
        docs_url=None,  # its pages come from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(Door, metrics=metrics),
            Middleware(Guard, keys=settings.api_keys, hosts=settings.hosts),
            Middleware(
                BodyLimit,
                most=settings.limits.upload_bytes,
                seconds=settings.upload_seconds,
                together=settings.limits.uploads_bytes,
            ),
        ],
    )
    app.state.context = context
    for kind in (AllaprimaError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer)
    web_ui = (WebUI().router(), a1111_lists.router)
    for router in (page_router(), health.router, openai.router, native.router, *web_ui):
        app.include_router(router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    context: Context = app.state.context
    await anyio.to_thread.run_sync(context.studio.start)
    yield
    await anyio.to_thread.run_sync(context.studio.close, _CLOSE_SECONDS)
    context.workers.close()


async def _answer(request: Request, error: Exception) -> Response:
    failure = failure_of(error)
    note(request.scope, rejected=failure.code)
    if failure.status >= 500:
        note(request.scope, error=type(error).__name__)
    return reply(failure, request.url.path)
