"""Health, metrics, logs, and the end."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
from typing import Any

import httpx
import pytest

from allaprima.bundle import BackendError
from allaprima.runtime import Request
from allaprima.serve.app import create_app
from allaprima.serve.jobs import Job, Order
from allaprima.serve.logs import JsonFormatter, start_logging
from allaprima.serve.metrics import Metrics
from allaprima.serve.server import listen
from allaprima.serve.server import serve as serve_until_the_end

from .conftest import Running, Serve, until
from .fakes import SHAPES, FakeStudio


def test_health(serve: Serve) -> None:
    server = serve()
    with server.client() as client:
        assert client.get("/health/live").json() == {"status": "live"}
        assert client.get("/health/ready").json() == {"status": "ready"}
        server.studio.ready = False
        answer = client.get("/health/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "starting"})
        assert client.get("/health/live").status_code == 200


def test_health_of_a_studio_that_failed() -> None:
    """Without our server around it, which would end."""
    studio = FakeStudio()
    studio.failure = BackendError("/secret")

    async def ask(path: str) -> httpx.Response:
        transport = httpx.ASGITransport(create_app(studio))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(path)

    for path in ("/health/ready", "/health/live"):
        answer = asyncio.run(ask(path))
        assert (answer.status_code, answer.json()) == (503, {"status": "failed"})


def test_a_studio_that_fails_ends_the_server(caplog: pytest.LogCaptureFixture) -> None:
    for failure in (BackendError("no such device"), RuntimeError("broken")):
        studio = FakeStudio()
        studio.failure = failure
        with (
            listen("127.0.0.1", 0) as listener,
            pytest.raises(BackendError, match=r"device|its log says why"),
        ):
            serve_until_the_end(create_app(studio), listener, drain_seconds=1)  # type: ignore[arg-type]
        assert str(failure) in caplog.text


def test_metrics_of_requests(serve: Serve) -> None:
    server = serve()
    with server.client() as client:
        client.post("/v1/images/generations", json={"prompt": "a secret"})
        client.post("/v1/images/generations", json={"prompt": "a secret", "n": 0})
        client.get("/nothing/at/all")
        server.studio.hold()
        client.post("/api/jobs", json={"prompt": "a secret"})
        until(lambda: server.studio.load().running)
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    request = 'allaprima_requests_total{method="POST",route="/v1/images/generations"'
    assert f'{request},status="200"}} 1.0' in lines
    assert f'{request},status="400"}} 1.0' in lines
    assert 'allaprima_requests_total{method="GET",route="none",status="404"} 1.0' in lines
    assert 'allaprima_rejected_total{reason="invalid_value"} 1.0' in lines
    assert 'allaprima_rejected_total{reason="not_found"} 1.0' in lines
    assert "allaprima_running_jobs 1.0" in lines
    assert "allaprima_queued_jobs 0.0" in lines
    assert 'allaprima_busy_lanes{model="shapes",size="128x128"} 1.0' in lines
    assert 'allaprima_file_seconds_count{format="png"} 1.0' in lines
    assert "secret" not in answer.text
    assert "/nothing/at/all" not in answer.text


def test_metrics_of_the_studio() -> None:
    metrics = Metrics()
    metrics.stepped("shapes", 64, 128, 3, 0.2)
    metrics.staged("shapes", "encode", 0.1)
    job = Job(Order(Request("x")), "shapes", Request("x").check(SHAPES))
    job.finish(BackendError("broken"))
    metrics.ended(job)
    text = metrics.text().decode()
    assert 'allaprima_step_seconds_count{lanes="3",model="shapes",size="128x64"} 1.0' in text
    assert 'allaprima_stage_seconds_sum{model="shapes",stage="encode"} 0.1' in text
    assert 'allaprima_jobs_total{model="shapes",state="failed"} 1.0' in text


def test_sizes_in_metrics_are_bounded() -> None:
    metrics = Metrics()
    for side in range(100):
        metrics.stepped("shapes", 32, 32 * side, 1, 0.1)
    text = metrics.text().decode()
    assert 'size="other"' in text
    assert text.count("allaprima_step_seconds_count") == 33


def test_a_line_in_the_log(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "allaprima.serve"):
        headers = {"x-request-id": "mine"}
        body = {"prompt": "a secret", "n": 2, "num_inference_steps": 4}
        client.post("/v1/images/generations", json=body, headers=headers)
        until(lambda: caplog.records)
    facts: dict[str, Any] = caplog.records[0].facts  # type: ignore[attr-defined]
    assert facts.pop("seconds") > 0
    assert len(facts.pop("job")) == 24
    assert facts == {
        "method": "POST",
        "route": "/v1/images/generations",
        "status": 200,
        "id": "mine",
        "model": "shapes",
        "size": "128x128",
        "steps": 4,
        "images": 2,
    }


@pytest.mark.parametrize("asked", [False, True])
def test_prompts_are_logged_only_if_asked(
    serve: Serve, caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    server = serve(log_prompts=asked)
    with caplog.at_level("INFO"), server.client() as client:
        client.post("/v1/images/generations", json={"prompt": "a secret", "negative_prompt": "another"})
        until(lambda: [each for each in caplog.records if each.message == "request"])
    lines = "".join(JsonFormatter().format(each) for each in caplog.records)
    assert ("a secret" in lines) is asked
    assert ("another" in lines) is asked


def test_lines_are_json(request: pytest.FixtureRequest) -> None:
    loggers = [logging.getLogger(name) for name in ("allaprima", "uvicorn")]
    before = [(each.handlers, each.propagate, each.level) for each in loggers]

    def restore() -> None:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)

    request.addfinalizer(restore)
    stream = io.StringIO()
    start_logging(stream)
    logging.getLogger("allaprima.serve").info("done\n%s", "é", extra={"facts": {"id": 3}})
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("uvicorn.error").exception("failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["message"], first["id"], first["level"]) == ("done\né", 3, "info")
    assert "ValueError: broken" in second["traceback"]


class Waiting(threading.Thread):
    """A client that waits for an answer."""

    def __init__(self, server: Running) -> None:
        super().__init__()
        self.server = server
        self.answer: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        with self.server.client() as client:
            self.answer = client.post("/v1/images/generations", json={"prompt": "x"})


def test_the_end_in_good_order(serve: Serve) -> None:
    """What runs is finished, what waits and what comes is refused, and then nothing listens."""
    server = serve()
    server.studio.hold()
    first = Waiting(server)
    until(lambda: server.studio.load().running == 1)
    second = Waiting(server)
    until(lambda: server.studio.load().queued == 1)
    server.server.handle_exit(15, None)
    second.join(10)
    assert second.answer is not None
    assert second.answer.status_code == 503
    assert second.answer.json()["error"]["code"] == "draining"
    with server.client() as client:
        assert client.get("/health/ready").status_code == 503
        assert client.post("/api/jobs", json={"prompt": "x"}).status_code == 503
    assert first.is_alive()
    server.studio.go()
    first.join(10)
    assert first.answer is not None
    assert first.answer.status_code == 200
    until(lambda: _is_gone(server))


def test_patience_has_an_end(serve: Serve) -> None:
    server = serve(drain_seconds=0.1)
    server.studio.hold()
    waiting = Waiting(server)
    until(lambda: server.studio.load().running == 1)
    server.server.handle_exit(15, None)
    waiting.join(10)
    assert waiting.answer is not None
    assert waiting.answer.status_code == 503
    until(lambda: _is_gone(server))


def _is_gone(server: Running) -> bool:
    try:
        with server.client() as client:
            client.get("/health/live")
    except httpx.TransportError:
        return True
    return False


def test_the_fake_is_a_studio() -> None:
    """The stand-in has whatever the real one has."""
    from allaprima.serve.studio import Studio

    public = {name for name in vars(Studio) if not name.startswith("_")}
    assert public - {"wait_ready"} <= {*dir(FakeStudio), *vars(FakeStudio())}
