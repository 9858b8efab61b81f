"""The web page: its few files, read once, and what a browser is allowed to do with them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Header, HTTPException, Response

KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""The media types of the page's files by their suffix; there are no others."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # The browser itself refuses to read a text as HTML: nothing that anybody says can become code.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Kept, but asked for again: an upgrade is seen at once, and costs a 304 at all other times.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Asset:
    """One file of the page; `tag` is its entity tag, quoted."""

    content: bytes
    kind: str
    tag: str


def read_assets() -> dict[str, Asset]:
    """The files of the page by their names."""
    assets = {}
    for file in files("allaprima.serve").joinpath("page").iterdir():
        kind = KINDS.get(file.name.rpartition(".")[2])
        if kind is not None:
            content = file.read_bytes()
            assets[file.name] = Asset(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return assets


def page_router() -> APIRouter:
    """The routes of the page, `/` and `/page/{name}`. They hold no secret and want no key."""
    assets = read_assets()
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(if_none_match: Annotated[str | None, Header()] = None) -> Response:
        return _answer(assets["index.html"], if_none_match)

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def file(name: str, if_none_match: Annotated[str | None, Header()] = None) -> Response:
        if name not in assets:
            raise HTTPException(404, "the page has no such file")
        return _answer(assets[name], if_none_match)

    return router


def _answer(asset: Asset, known: str | None) -> Response:
    """The file, or 304 where the browser has it."""
    headers = {**HEADERS, "ETag": asset.tag}
    tags = {tag.strip().removeprefix("W/") for tag in (known or "").split(",")}
    if asset.tag in tags or "*" in tags:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, media_type=asset.kind, headers=headers)
