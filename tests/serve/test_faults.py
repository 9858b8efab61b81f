"""Faults at the door: each has its status and envelope, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from allaprima.serve.protocol import PatientProtocol

from .conftest import LIMITS, Running, Serve, submit_raw, until

JSON = {"content-type": "application/json"}
HEAD = "POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
PATHS = ("/v1/images/generations", "/api/jobs")


@pytest.fixture(autouse=True)
def _clean(server: Running) -> Any:
    """Nothing was ordered."""
    yield
    assert server.studio.asked == []
    assert server.studio.jobs() == ()


def is_refused(answer: httpx.Response, path: str, status: int, code: str) -> None:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    if path.startswith("/v1"):
        assert answer.json()["error"]["code"] == code
    else:
        assert set(answer.json()) == {"detail"}
    assert "Traceback" not in answer.text
    assert ".py" not in answer.text


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": "x",}',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b"[" * 200_000,
        b'{"prompt": "x", "seed": ' + b"1" * 10_000 + b"}",
    ],
    ids=["empty", "cut", "comma", "utf-16", "latin-1", "deep", "long number"],
)
def test_malformed_json(client: httpx.Client, path: str, body: bytes) -> None:
    answer = client.post(path, content=body, headers=JSON)
    assert answer.status_code in (400, 422)
    assert len(answer.content) < 1000


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body", [[], "x", 3, None, {}, {"prompt": None}, {"prompt": "\ud800"}, {"\ud800": 1}]
)
def test_json_of_another_kind(client: httpx.Client, path: str, body: Any) -> None:
    answer = client.post(path, content=json.dumps(body), headers=JSON)
    assert answer.status_code == (400 if path.startswith("/v1") else answer.status_code)
    assert answer.status_code in (400, 422)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_no_numbers(client: httpx.Client, path: str, number: str) -> None:
    body = f'{{"prompt": "x", "guidance_scale": {number}}}'
    assert client.post(path, content=body, headers=JSON).status_code in (400, 422)


@pytest.mark.parametrize("path", [*PATHS, "/v1/images/edits"])
@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_wrong_content_type(client: httpx.Client, path: str, kind: str) -> None:
    answer = client.post(path, content=b'{"prompt": "x"}', headers={"content-type": kind} if kind else {})
    is_refused(answer, path, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "body", [b"", b"--x\r\n", b"nothing", b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n"]
)
def test_malformed_forms(client: httpx.Client, body: bytes) -> None:
    for path in ("/v1/images/edits", "/api/jobs"):
        headers = {"content-type": "multipart/form-data; boundary=x"}
        assert client.post(path, content=body, headers=headers).status_code in (400, 422)
        answer = client.post(path, content=body, headers={"content-type": "multipart/form-data"})
        assert answer.status_code in (400, 422)


@pytest.mark.parametrize("charset", ["undefined", "punycode", "latin-1"])
def test_forms_in_another_charset(client: httpx.Client, charset: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nb\r\n--x--\r\n'
    for path in ("/v1/images/edits", "/api/jobs"):
        headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
        answer = client.post(path, content=body, headers=headers)
        is_refused(answer, path, 415, "unsupported_media_type")


@pytest.mark.parametrize("path", PATHS)
def test_many_fields_that_are_wrong(client: httpx.Client, path: str) -> None:
    body = {"prompt": "x", "n": [], "steps": [], **{f"unknown{number}": 0 for number in range(20_000)}}
    answer = client.post(path, json=body)
    assert answer.status_code in (400, 422)
    assert len(answer.content) < 1000


@pytest.mark.parametrize("path", PATHS)
def test_numbers_beyond_reason(client: httpx.Client, path: str) -> None:
    for name in ("num_inference_steps", "steps", "n", "num_images", "batch_size", "clip_skip", "width"):
        answer = client.post(path, content=f'{{"prompt": "x", "{name}": 1{"0" * 400}}}', headers=JSON)
        assert answer.status_code in (400, 422)


@pytest.mark.parametrize("path", [*PATHS, "/v1/images/edits"])
def test_oversized_bodies(client: httpx.Client, path: str) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x" if "edits" in path else JSON["content-type"]}
    for _ in range(5):  # the answer gets through, though it is there before the body
        answer = client.post(path, content=b" " * (3 * LIMITS.upload_bytes), headers=headers)
        is_refused(answer, path, 413, "body_too_large")


def test_who_asks_before_it_sends(server: Running) -> None:
    head = f"{HEAD}Expect: 100-continue\r\nContent-Length: {LIMITS.upload_bytes + 1}\r\n\r\n"
    assert submit_raw(server.url, head).startswith("HTTP/1.1 413")


def test_a_body_without_end(server: Running) -> None:
    """The server hangs up on it, whether or not the client sees the answer."""
    head = f"{HEAD}Content-Length: {10**12}\r\n\r\n"
    chunk = b" " * (1 << 20)
    with contextlib.suppress(ConnectionError):
        assert submit_raw(server.url, head, *[chunk] * 40).startswith("HTTP/1.1 413")


def test_a_body_that_does_not_say_how_long_it_is(server: Running) -> None:
    head = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = submit_raw(server.url, head, *[chunk] * (2 * LIMITS.upload_bytes // 0x10000), b"0\r\n\r\n")
    assert answer.startswith("HTTP/1.1 413")


def test_a_body_that_lies_about_its_length(serve: Serve) -> None:
    server = serve(upload_seconds=0.2)
    head = f"{HEAD}Content-Length: {'9' * 40}\r\n\r\n"
    assert submit_raw(server.url, head).split(" ")[1] in ("400", "413")


def test_a_slow_upload(serve: Serve) -> None:
    server = serve(upload_seconds=0.3)
    head = f"{HEAD}Content-Length: 90\r\n\r\n"
    answer = submit_raw(server.url, head, "{", "{", pause=0.1)
    assert answer.startswith("HTTP/1.1 408")
    assert '"code": "too_slow"' in answer
    assert server.studio.asked == []


def test_a_slow_head(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the second one on a connection; a request that is answered slowly is another matter."""
    monkeypatch.setattr(PatientProtocol, "head_seconds", 0.3)
    server = serve()
    assert submit_raw(server.url, "") == ""
    assert submit_raw(server.url, "GET / HTTP/1.1\r\nHost") == ""
    whole = "GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = submit_raw(server.url, whole, "GET / HTTP/1.1\r\n", pause=0.1)
    assert answer.startswith("HTTP/1.1 200")
    assert answer.count("HTTP/1.1") == 1
    server.studio.hold()
    timer = threading.Timer(0.6, server.studio.go)
    timer.start()
    with server.client() as client:
        answered = client.post("/v1/images/generations", json={"prompt": "x"})
    assert answered.status_code == 200


def test_uploads_that_are_too_much_together(serve: Serve) -> None:
    server = serve(limits=replace(LIMITS, uploads_bytes=LIMITS.upload_bytes))
    half = b" " * (LIMITS.upload_bytes // 2 + 1)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as first:
        first.sendall(f"{HEAD}Content-Length: {2 * len(half) - 2}\r\n\r\n".encode() + half)
        answers: list[str] = []
        head = f"{HEAD}Connection: close\r\nContent-Length: {len(half)}\r\n\r\n"

        def refused() -> bool:  # once the first's bytes have come
            answers.append(submit_raw(server.url, head, half))
            return answers[-1].startswith("HTTP/1.1 429")

        until(refused)
        assert "retry-after: 1" in answers[-1]

    def taken() -> bool:  # once the first has left, and its bytes with it
        with server.client() as client:
            answer = client.post("/v1/images/generations", content=half, headers=JSON)
        return answer.status_code == 400

    until(taken)


def test_a_body_after_the_answer(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no key is told at once, and cannot hold the connection by going on with the body."""
    monkeypatch.setattr(PatientProtocol, "body_seconds", 0.3)
    server = serve(api_keys=("a",))
    head = f"{HEAD}Content-Length: {10**6}\r\n\r\n"
    begun = time.monotonic()
    with contextlib.suppress(ConnectionError):
        assert submit_raw(server.url, head, *[b" "] * 20, pause=0.1).startswith("HTTP/1.1 401")
    assert time.monotonic() - begun < 5


def test_who_does_not_take_the_answer(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "read_seconds", 0.2)
    server = serve()
    head = f"{HEAD}Content-Length: %d\r\n\r\n"
    body = '{"prompt": "x", "n": 8, "size": "512x512", "num_inference_steps": 1, "sampler": "ddim"}'
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
    monkeypatch.setattr("allaprima.serve.encoding.encode_image", lambda *_, **__: noise.tobytes())
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall((head % len(body) + body).encode())
        until(lambda: server.studio.asked)
        until(lambda: not server.server.server_state.connections)
    with server.client() as client:
        assert client.get("/health/live").status_code == 200


@pytest.mark.parametrize("path", [*PATHS, "/v1/images/edits"])
def test_who_leaves_in_mid_upload(server: Running, path: str, caplog: pytest.LogCaptureFixture) -> None:
    kind = "multipart/form-data; boundary=x" if "edits" in path else JSON["content-type"]
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n\r\n"
    body = '--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n123'
    with caplog.at_level("INFO", "allaprima.serve"):
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall((head + body).encode())
        until(lambda: [each for each in caplog.records if each.message == "request"])
    facts = caplog.records[-1].facts  # type: ignore[attr-defined]
    assert (facts["status"], facts["route"]) == (499, path)
    assert [each.levelname for each in caplog.records] == ["INFO"]


def test_what_is_not_there(client: httpx.Client) -> None:
    is_refused(client.get("/v1/nothing"), "/v1/nothing", 404, "not_found")
    is_refused(client.get("/nothing"), "/nothing", 404, "not_found")
    answer = client.get("/v1/images/generations")
    is_refused(answer, "/v1/images/generations", 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_request_ids(client: httpx.Client) -> None:
    assert client.get("/health/live", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 65, '"', ""):
        made = client.get("/health/live", headers={"x-request-id": bad}).headers["x-request-id"]
        assert made != bad
        assert len(made) == 24


def test_headers_of_every_answer(client: httpx.Client) -> None:
    for path in ("/health/live", "/nothing", "/metrics"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_what_nobody_foresaw(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()

    def broken() -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(server.studio, "models", broken)
    with server.client() as client:
        for path in ("/v1/models", "/api/models"):
            is_refused(client.get(path), path, 500, "server_error")
            assert "secret" not in client.get(path).text
    assert "/secret/path" in caplog.text
