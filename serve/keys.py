"""Who is let in: by API key, and without keys only who is no page of another site.

Everything is shut but `OPEN`, whatever route may be added.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import secrets
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from allaprima.bundle import RequestError
from allaprima.serve.failures import Failure, reply
from allaprima.serve.notes import note

OPEN = ("/", "/health/live", "/health/ready")
"""Paths that need no key: the page, which asks for one itself, and what orchestrators ask."""
OPEN_BELOW = ("/page/", "/v1/files/images/")
"""All below these neither: what the page is made of, and pictures under names that nobody can guess."""

_UNAUTHORIZED = Failure(
    401,
    "invalid_api_key",
    "an API key is needed: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
    headers={"www-authenticate": "Bearer"},
)
_SAFE = ("GET", "HEAD", "OPTIONS")


def check_keys(keys: Sequence[str]) -> None:
    """Raises RequestError for a key that no header can carry."""
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise RequestError("an API key is empty, or holds spaces or other than ASCII: choose another")


def owner_of(request: Request) -> str | None:
    """A name, without meaning, for whoever sent a request; None where there are no keys."""
    owner: str | None = getattr(request.state, "owner", None)
    return owner


class Guard:
    """Turns away what has no key, and tells the others apart."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], hosts: Sequence[str] | None) -> None:
        self.app = app
        self._keys = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] == "websocket":  # there are none, and none shall slip in without a key
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http" and (failure := self._refuse(scope)) is not None:
            note(scope, rejected=failure.code)
            await reply(failure, scope["path"])(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refuse(self, scope: Scope) -> Failure | None:
        headers = Headers(scope=scope)
        if not self._keys:
            return self._refuse_site(scope, headers)
        owner = self._owner(headers)
        scope.setdefault("state", {})["owner"] = owner
        path: str = scope["path"]
        return None if owner or path in OPEN or path.startswith(OPEN_BELOW) else _UNAUTHORIZED

    def _owner(self, headers: Headers) -> str | None:
        """Of the key that fits. All are compared, in constant time, whichever that is."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key", "")
        if scheme.lower() == "bearer":
            given = token.strip()
        elif scheme.lower() == "basic":
            given = _password(token)
        digest = hashlib.sha256(given.encode()).digest()
        found = [key for key in self._keys if secrets.compare_digest(key, digest)]
        return found[0].hex()[:16] if found and given else None

    def _refuse_site(self, scope: Scope, headers: Headers) -> Failure | None:
        """Where nobody needs a key, a page that the user happens to look at must not use the server."""
        host = headers.get("host", "")
        if self._hosts is not None and not _is_known(host, self._hosts):
            return Failure(
                403,
                "unknown_host",
                "the server does not answer to this name: call it by its address, or localhost",
            )
        if scope["method"] in _SAFE:
            return None
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        foreign = site in ("cross-site", "same-site") or (
            site is None and origin is not None and _site(origin) != host
        )
        if foreign:
            return Failure(403, "cross_site", "pages of other sites may not use a server without API keys")
        return None


def _password(token: str) -> str:
    """That of HTTP Basic, which clients of AUTOMATIC1111's web UI send; "" if it is none."""
    try:
        return base64.b64decode(token, validate=True).decode("ascii").partition(":")[2]
    except ValueError:
        return ""


def _is_known(host: str, names: Sequence[str]) -> bool:
    """Whether a Host header, with or without port, is an IP address or one of the names."""
    try:
        name = urlsplit(f"//{host}").hostname if host.isascii() else None
    except ValueError:
        return False
    if not name:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower() in names
    return True


def _site(origin: str) -> str | None:
    """Host and port of an Origin header; None if it has none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
