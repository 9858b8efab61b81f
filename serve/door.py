"""What every request goes through first and last: its id, its line in the log, and the last resort."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from allaprima.serve.failures import failure_of, reply
from allaprima.serve.metrics import Metrics
from allaprima.serve.notes import note, noted_in

_LEFT = 499
"""The status in the log for a client that did not wait for the answer, as nginx has it."""
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_log = logging.getLogger("allaprima.serve")


class Door:
    """The outermost of our own layers."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        id = given if _SANE_ID.fullmatch(given) else secrets.token_hex(12)
        note(scope, id=id)
        begun, status = time.perf_counter(), _LEFT

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = id
                headers["x-content-type-options"] = "nosniff"
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except ClientDisconnect:
            status = _LEFT
        except Exception as error:
            _log.exception("a request failed", extra={"facts": {"id": id}})
            if (
                status != _LEFT
            ):  # the answer has begun: the server cuts it off, so that nobody takes it for whole
                raise
            await reply(failure_of(error), scope["path"])(scope, receive, answer)
        finally:
            self._take_down(scope, status, time.perf_counter() - begun)

    def _take_down(self, scope: Scope, status: int, seconds: float) -> None:
        facts: dict[str, Any] = noted_in(scope)
        # The pattern and not the path, whose parts may be secret or endlessly many.
        route = getattr(scope.get("route"), "path", "none")
        _log.info(
            "request",
            extra={
                "facts": {
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "seconds": round(seconds, 4),
                    **facts,
                }
            },
        )
        self._metrics.answered(scope["method"], route, status, seconds)
        if (reason := facts.get("rejected")) is not None:
            self._metrics.rejected(reason)
