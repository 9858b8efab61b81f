"""The files of the page, and what comes with them."""

import re

import httpx
import pytest

from allaprima.serve.page_routes import POLICY, read_assets

from .conftest import Serve

ASSETS = read_assets()


def test_every_file_of_the_page_is_handed_out(client: httpx.Client) -> None:
    assert {"index.html", "style.css", "app.js", "icon.svg"} <= set(ASSETS)
    for name, asset in ASSETS.items():
        answer = client.get(f"/page/{name}")
        assert answer.status_code == 200
        assert answer.content == asset.content
        assert answer.headers["content-type"] == asset.kind
    assert client.get("/").content == ASSETS["index.html"].content


@pytest.mark.parametrize("path", ["/", "/page/app.js"])
def test_browsers_are_told_to_be_strict(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    assert headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_what_a_browser_has_is_not_sent_again(client: httpx.Client) -> None:
    first = client.get("/page/app.js")
    tag = first.headers["etag"]
    for known in (tag, f'W/{tag}, "other"', "*"):
        again = client.get("/page/app.js", headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
        assert again.headers["cache-control"] == "no-cache"
    assert client.get("/page/app.js", headers={"if-none-match": '"other"'}).status_code == 200
    assert client.head("/").headers["etag"] == client.get("/").headers["etag"]


@pytest.mark.parametrize("name", ["nothing.js", "..%2fapp.py", "%2e%2e/app.py", "index.html/", ""])
def test_there_are_no_other_files(client: httpx.Client, name: str) -> None:
    assert client.get(f"/page/{name}").status_code == 404


def test_the_page_wants_no_key(serve: Serve) -> None:
    server = serve(api_keys=("anna",))
    with server.client() as client:
        assert client.get("/").status_code == 200
        assert client.get("/page/app.js").status_code == 200
        assert client.get("/api/models").status_code == 401


def test_the_page_needs_no_other_server() -> None:
    for name, asset in ASSETS.items():
        text = asset.content.decode()
        assert set(re.findall(r"(?:https?:)?//[\w.]+\.\w+", text)) <= {"http://www.w3.org"}, name


def test_the_page_refers_to_files_that_there_are() -> None:
    page = ASSETS["index.html"].content.decode()
    for name in re.findall(r'(?:href|src)="page/([^"]+)"', page):
        assert name in ASSETS
    for asset in ASSETS.values():
        for name in re.findall(r'from "\./([^"]+)"', asset.content.decode()):
            assert name in ASSETS


def test_scripts_use_the_elements_that_there_are() -> None:
    page = ASSETS["index.html"].content.decode()
    there = set(re.findall(r' id="([^"]+)"', page))
    for name, asset in ASSETS.items():
        for id in re.findall(r'\$\("([^"]+)"\)', asset.content.decode()):
            assert id in there, f"{name}: {id}"


def test_what_is_said_never_becomes_code() -> None:
    for name, asset in ASSETS.items():
        assert not re.search(
            rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", asset.content
        ), name
        assert not re.search(rb"\s(style|on[a-z]+)=\"", asset.content), f"{name}: the policy forbids it"
