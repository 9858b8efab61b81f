"""Every route is shut, but those that are listed here once more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from allaprima.bundle import RequestError
from allaprima.serve.app import create_app
from allaprima.serve.settings import ServerSettings

from .conftest import Serve, submit_raw
from .fakes import FakeStudio

KEYS = ("a-first-key", "a-second-key")
OPEN = {"/", "/page/{name}", "/health/live", "/health/ready", "/v1/files/images/{name}"}


def routes(app: Any) -> Iterator[tuple[str, str]]:
    """Methods and paths of all routes, however they are nested."""
    for route in app.routes:
        inner = getattr(route, "original_router", None) or (route if hasattr(route, "routes") else None)
        if inner is not None:
            yield from routes(inner)
        for method in getattr(route, "methods", None) or ():
            yield method, route.path


APP = create_app(FakeStudio(), ServerSettings(api_keys=KEYS))  # type: ignore[arg-type]
ROUTES = sorted(set(routes(APP)))


def test_the_walk_finds_them_all() -> None:
    documented = {
        (method.upper(), path) for path, methods in APP.openapi()["paths"].items() for method in methods
    }
    assert documented <= set(ROUTES)
    assert len(documented) >= 16
    assert ("GET", "/openapi.json") in ROUTES


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=lambda value: value)
def test_a_key_is_needed(shut: httpx.Client, method: str, path: str) -> None:
    place = re.sub(r"\{[^}]*\}", "0", path)
    wrong = ({}, {"x-api-key": "a-first-ke"}, {"authorization": "Bearer x"}, {"authorization": KEYS[0]})
    if path in OPEN:
        assert shut.request(method, place).status_code not in (401, 403)
        return
    for headers in wrong:
        answer = shut.request(method, place, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    for headers in ({}, {"authorization": "Bearer"}, {"x-api-key": ""}):
        assert shut.request(method, place, headers=headers).status_code == 401
    for headers in ({"x-api-key": KEYS[0]}, {"authorization": f"bearer {KEYS[1]}"}):
        answer = shut.request(method, place, headers=headers)
        assert answer.status_code != 401


@pytest.fixture(scope="module")
def shut() -> Iterator[httpx.Client]:
    from .conftest import LIMITS, running

    settings = ServerSettings(api_keys=KEYS, limits=LIMITS)
    with running(FakeStudio(), settings) as server, server.client() as client:
        yield client


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1/", "//v1/models", "/health/live/", "/page/../v1/models", "/health/../v1/models"]
)
def test_what_is_not_there_is_shut_too(shut: httpx.Client, path: str) -> None:
    url = str(shut.base_url).rstrip("/")
    assert submit_raw(url, f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").startswith(
        ("HTTP/1.1 401", "HTTP/1.1 404")
    )
    assert "shapes" not in submit_raw(url, f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")


def test_the_envelope_of_openai(shut: httpx.Client) -> None:
    error = shut.get("/v1/models").json()["error"]
    assert error["code"] == "invalid_api_key"
    assert error["type"] == "invalid_request_error"
    assert shut.get("/api/models").json().keys() == {"detail"}


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "line\nbreak"])
def test_keys_that_no_header_carries(key: str) -> None:
    with pytest.raises(RequestError, match="choose another"):
        create_app(FakeStudio(), ServerSettings(api_keys=(key,)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "192.168.1.2"}, 200),
        ({"host": "studio.lan"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "[::1"}, 403),
    ],
)
def test_names_of_an_open_server(serve: Serve, headers: dict[str, str], status: int) -> None:
    server = serve(hosts=("localhost", "studio.lan"))
    with server.client() as client:
        assert client.get("/api/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 202),
        ({"origin": "http://studio.lan", "host": "studio.lan"}, 202),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[::1"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "same-origin", "origin": "https://proxy.example"}, 202),
        ({"sec-fetch-site": "none"}, 202),
    ],
)
def test_pages_of_other_sites(client: httpx.Client, headers: dict[str, str], status: int) -> None:
    """A form needs nobody's leave to be sent elsewhere, and without keys that is all it takes."""
    files = {"prompt": (None, "x")}
    assert client.post("/api/jobs", files=files, headers=headers).status_code == status
    assert client.get("/api/models", headers=headers).status_code == 200
