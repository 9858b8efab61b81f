"""The one place that says which error is which HTTP status, and in what words.

The client of OpenAI tries again after 408, 409, 429 and 5xx: what would fail again must have another status,
or say so in `x-should-retry`. What a user may not see (paths, what broke inside) is left out here.
"""

from __future__ import annotations

import http
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from allaprima.bundle import BackendError, BundleError, RequestError
from allaprima.serve.errors import (
    BusyError,
    CancelledError,
    DeadlineError,
    DrainingError,
    OverLimitError,
    UnknownModelError,
)

BROKEN = "the server could not paint this: its log says why"
_DO_NOT_RETRY = {"x-should-retry": "false"}
_DRAINING_SECONDS = 5
_LONGEST = 2000
"""Characters of a message: it may repeat what a client sent."""


class Refusal(HTTPException):
    """A request that is turned down before the runtime sees it. `code` is a word for programs."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code


@dataclass(frozen=True)
class Failure:
    """What goes to the client; `details` are those of single fields."""

    status: int
    code: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    details: Sequence[Mapping[str, Any]] | None = None


def failure_of(error: BaseException) -> Failure:
    """The status, the words and the headers for an error."""
    match error:
        case RequestValidationError():
            return _invalid(error.errors())
        case Refusal():
            return Failure(error.status_code, error.code, str(error.detail), headers=error.headers or {})
        case HTTPException():
            code = http.HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
            return Failure(error.status_code, code, str(error.detail), headers=error.headers or {})
        case UnknownModelError():
            return Failure(404, "model_not_found", str(error), "model")
        case OverLimitError():
            return Failure(400, "over_limit", str(error))
        case RequestError():
            return Failure(400, "invalid_request", str(error))
        case BusyError():
            return Failure(429, "busy", str(error), headers={"retry-after": str(error.retry_after)})
        case DrainingError():
            return Failure(503, "draining", str(error), headers={"retry-after": str(_DRAINING_SECONDS)})
        case DeadlineError():
            return Failure(504, "deadline", str(error), headers=_DO_NOT_RETRY)
        case CancelledError():
            return Failure(409, "cancelled", str(error), headers=_DO_NOT_RETRY)
        case BackendError() | BundleError():  # out of memory, or damaged: it would be so again
            return Failure(500, "server_error", BROKEN, headers=_DO_NOT_RETRY)
    return Failure(500, "server_error", BROKEN)


def _invalid(errors: Sequence[Any]) -> Failure:
    """Fields that are wrong. What was given is not repeated: it may be long, or no JSON."""
    details: list[dict[str, Any]] = [
        {"type": each["type"], "loc": list(each["loc"]), "msg": each["msg"]} for each in errors
    ]
    nothing: dict[str, Any] = {"type": "", "loc": [], "msg": "the request is not valid"}
    first = details[0] if details else nothing
    where = ".".join(str(each) for each in first["loc"] if each not in ("body", "query", "path"))
    if first["type"] == "extra_forbidden":
        return Failure(422, "unknown_parameter", f"Unknown parameter: '{where}'.", where, details=details)
    if first["type"] == "json_invalid":
        return Failure(
            400,
            "invalid_json",
            f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}",
            details=details,
        )
    message = f"{where}: {first['msg']}" if where else first["msg"]
    return Failure(422, "invalid_value", message, where or None, details=details)


def reply(failure: Failure, path: str) -> Response:
    """The answer to a request for `path`: in OpenAI's envelope under /v1, else as FastAPI words it.

    Clients of AUTOMATIC1111's web UI find what they look for besides.
    """
    status, headers, message = failure.status, dict(failure.headers), failure.message[:_LONGEST]
    body: dict[str, Any]
    if path.startswith("/v1/"):
        status = 400 if status == 422 else status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if status == 429 else kind
        error = {"message": message, "type": kind, "param": failure.param, "code": failure.code}
        body = {"error": error}
    else:
        body = {"detail": message if failure.details is None else failure.details}
        if path.startswith("/sdapi/"):
            body |= {"error": failure.code, "errors": message, "body": ""}
    # ASCII, because the name of an unknown field may hold what UTF-8 cannot.
    content = json.dumps(body, ensure_ascii=True).encode("ascii")
    return Response(content, status, headers, media_type="application/json")


class ErrorFields(BaseModel):
    """What an error under /v1 says."""

    message: str
    type: str
    param: str | None
    code: str | None


class Envelope(BaseModel):
    """An error under /v1."""

    error: ErrorFields


class FieldError(BaseModel):
    """A field that is wrong."""

    type: str
    loc: list[str | int]
    msg: str


class Detail(BaseModel):
    """An error of the other APIs."""

    detail: str | list[FieldError]


def documented(*statuses: int, model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI schema: the errors that a route may answer with."""
    return {status: {"model": model, "description": http.HTTPStatus(status).phrase} for status in statuses}
