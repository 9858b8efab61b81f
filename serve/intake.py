"""Bodies of requests: how large they may be, how long they may take, and what is in them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from allaprima.serve.failures import Refusal, failure_of, reply
from allaprima.serve.notes import note

Fields = TypeVar("Fields", bound=BaseModel)
Files = dict[str, list[bytes]]

_MOST_FIELDS, _MOST_FILES = 64, 16
_MOST_ERRORS = 100
"""That are told one by one."""
_LARGE = 1 << 16
"""Bytes of JSON that are read off the event loop."""
_DISCARDED = 4
"""Times the most that is taken: so much more of a body that is too large is waited for."""


@dataclass
class _Held:
    """Bytes of a request's body that were read."""

    size: int = 0


class BodyLimit:
    """Bounds what is read of a request, in bytes and in seconds, and of all requests together in bytes."""

    def __init__(self, app: ASGIApp, most: int, seconds: float, together: int) -> None:
        self.app, self._most, self._seconds, self._together = app, most, seconds, together
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._most:
            if "expect" not in headers:  # who asks before it sends is told before it sends
                await self._discard(receive, time.monotonic() + self._seconds)
            failure = failure_of(self._too_large())
            note(scope, rejected=failure.code)
            await reply(failure, scope["path"])(scope, receive, send)
            return
        held = _Held()
        try:
            await self.app(scope, self._bounded(receive, held), send)
        finally:
            self._held -= held.size

    def _bounded(self, receive: Receive, held: _Held) -> Receive:
        whole, due = False, time.monotonic() + self._seconds

        async def next_message() -> Message:
            nonlocal whole
            if whole:  # what comes now is only that the client leaves
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(due - time.monotonic(), 0))
            except TimeoutError:
                raise Refusal(
                    408,
                    "too_slow",
                    f"the body was not here within {self._seconds:g} seconds",
                    {"connection": "close"},
                ) from None
            size = len(message.get("body", b""))
            held.size += size
            self._held += size
            whole = not message.get("more_body", False)
            crowded = size > 0 and self._held > max(self._together, self._most)
            if held.size > self._most or crowded:
                self._held -= held.size
                held.size = 0  # nobody keeps it
                if not whole:
                    await self._discard(receive, due)
                raise self._crowded() if crowded else self._too_large()
            return message

        return next_message

    async def _discard(self, receive: Receive, due: float) -> None:
        """Read on for a while, into nothing.

        Most clients read no answer before they have sent everything, and see a broken connection if nobody
        listens: they would send it again.
        """
        read, whole = 0, False
        with suppress(TimeoutError):
            while not whole and read < _DISCARDED * self._most:
                message = await asyncio.wait_for(receive(), max(due - time.monotonic(), 0))
                read += len(message.get("body", b""))
                whole = not message.get("more_body", False)

    def _crowded(self) -> Refusal:
        return Refusal(
            429,
            "busy",
            "too much is being uploaded at once: try later",
            {"connection": "close", "retry-after": "1"},
        )

    def _too_large(self) -> Refusal:
        return Refusal(
            413,
            "body_too_large",
            f"the body is too large: at most {self._most} bytes are taken",
            {"connection": "close"},
        )


def kind_of(request: Request) -> str:
    """The media type of a body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def wrong_kind(request: Request, *wanted: str) -> Refusal:
    """What to raise for a body of another media type."""
    given = kind_of(request) or "missing"
    return Refusal(
        415,
        "unsupported_media_type",
        f"the content type is {given[:100]!r}: it should be {' or '.join(wanted)}",
    )


async def read_json(request: Request, model: type[Fields], *, strict: bool = True) -> Fields:
    """The fields of a JSON body.

    If `strict`, types are taken as they are: "7" is no number. Raises RequestValidationError, or Refusal for
    another kind.
    """
    if kind_of(request) != "application/json":
        raise wrong_kind(request, "application/json")
    body = await request.body()
    try:
        if len(body) > _LARGE:
            return await asyncio.to_thread(model.model_validate_json, body, strict=strict)
        return model.model_validate_json(body, strict=strict)
    except ValidationError as error:
        raise _as_request_error(error) from error


async def read_form(
    request: Request, model: type[Fields], files: Sequence[str], *, repeated: Sequence[str] = ()
) -> tuple[Fields, Files]:
    """The fields of a multipart body, and the contents of its files by field.

    Names of files and what a client says of their kind are ignored. Fields are texts, and read as what they
    stand for; one that is there several times is a list. Raises RequestValidationError, or Refusal.
    """
    if kind_of(request) != "multipart/form-data":
        raise wrong_kind(request, "multipart/form-data")
    _, options = parse_options_header(request.headers.get("content-type", ""))
    if (charset := options.get(b"charset", b"utf-8")).lower() not in (b"utf-8", b"utf8"):
        raise Refusal(
            415,
            "unsupported_media_type",
            f"the charset is {charset[:50].decode('latin-1')!r}: it should be utf-8",
        )
    texts: dict[str, list[str]] = {}
    found: Files = {}
    async with request.form(max_fields=_MOST_FIELDS, max_files=_MOST_FILES) as form:
        for name, value in form.multi_items():
            if name in files and isinstance(value, UploadFile):
                found.setdefault(name, []).append(await value.read())
            elif isinstance(value, UploadFile) or name in files:
                what = "a file" if isinstance(value, UploadFile) else "no file"
                raise Refusal(400, "invalid_form", f"the field {name[:100]!r} is {what}")
            else:
                texts.setdefault(name, []).append(value)
    for name, contents in found.items():
        if len(contents) > 1 and name not in repeated:
            raise Refusal(400, "invalid_form", f"the field {name[:100]!r} is there {len(contents)} times")
    try:
        given = {name: values[0] if len(values) == 1 else values for name, values in texts.items()}
        return model.model_validate(given), found
    except ValidationError as error:
        raise _as_request_error(error) from error


def _as_request_error(error: ValidationError) -> RequestValidationError:
    if error.error_count() > _MOST_ERRORS:
        what = f"{error.error_count()} fields are wrong"
        return RequestValidationError([{"type": "value_error", "loc": ("body",), "msg": what}])
    details = error.errors(include_url=False, include_input=False, include_context=False)
    return RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in details])


def body_schema(
    plain: type[BaseModel] | None = None,
    *,
    multipart: type[BaseModel] | None = None,
    files: Sequence[str] = (),
) -> dict[str, Any]:
    """For OpenAPI: a body of JSON, of multipart fields with files, or either."""
    content: dict[str, Any] = {}
    if plain is not None:
        content["application/json"] = {"schema": _flat(plain.model_json_schema())}
    if multipart is not None:
        schema = _flat(multipart.model_json_schema())
        schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in files}
        content["multipart/form-data"] = {"schema": schema}
    return {"requestBody": {"required": True, "content": content}}


def _flat(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with its definitions in place of the references to them."""
    known = schema.pop("$defs", {})

    def put(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return put(known[value["$ref"].rpartition("/")[2]])
            return {name: put(each) for name, each in value.items()}
        return [put(each) for each in value] if isinstance(value, list) else value

    flat: dict[str, Any] = put(schema)
    return flat
