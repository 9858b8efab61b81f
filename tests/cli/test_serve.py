"""`allaprima serve`: who is let in, and a process that starts, paints and ends in good order."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from allaprima.bundle import RequestError
from allaprima.cli.serve import KEYS, configure, read_settings
from allaprima.serve.limits import Limits
from allaprima.serve.settings import ServerSettings

Allaprima = Callable[..., SimpleNamespace]


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS, raising=False)


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """As they were: the command logs to the stderr that it finds."""
    loggers = [logging.getLogger(name) for name in ("allaprima", "uvicorn")]
    before = [(each.handlers, each.propagate, each.level) for each in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def settings(*words: str) -> ServerSettings:
    parser = argparse.ArgumentParser()
    configure(parser)
    return read_settings(parser.parse_args(words))


def test_open_on_this_machine() -> None:
    found = settings()
    assert found.api_keys == ()
    assert found.hosts == ("localhost",)
    assert found.limits == Limits()
    assert settings("--allow-host", "studio.lan").hosts == ("localhost", "studio.lan")
    assert settings("--host", "::1").hosts == ("localhost",)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_a_network_needs_a_key(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match="--insecure lets everybody in"):
        settings("--host", host)
    assert settings("--host", host, "--api-key", "abc").hosts is None
    open_to_all = settings("--host", host, "--insecure", "--allow-host", "LAN")
    assert open_to_all.hosts == ("localhost", host, "lan")
    assert f"everybody who reaches {host}" in capsys.readouterr().err


def test_limits_that_depend_on_others() -> None:
    assert settings("--deadline", "7200").limits.most_deadline == 7200
    assert settings("--deadline", "60").limits.most_deadline == Limits().most_deadline
    assert settings("--max-pixels", "4096x4096").limits.work == 50 * 4096 * 4096
    assert settings("--max-pixels", "512x512").limits.work == Limits().work


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS, "one, two,")
    assert settings().api_keys == ("one", "two")
    assert settings("--api-key", "three", "--api-key", "four").api_keys == ("three", "four")


def test_limits() -> None:
    words = "--queue 3 --deadline 9.5 --max-images 2 --max-steps 20 --max-pixels 512x256 --max-upload 1MiB"
    found = settings(*words.split()).limits
    assert found == Limits(queue=3, deadline=9.5, images=2, steps=20, pixels=512 * 256, upload_bytes=1 << 20)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--host", "no.such.host.invalid"), "there is no host no.such.host.invalid"),
        (("--queue", "0"), "'0' should be a whole number of at least 1"),
        (("--drain", "nan"), "'nan' should be a number of seconds"),
        (("--warm", "512"), "'512' is not a size"),
        (("--max-upload", "much"), "much"),
        (("nowhere",), "nowhere"),
        (("--api-key", "a b"), "an API key is empty, or holds spaces"),
        (("--memory-limit", "much"), "much"),
        (("--port", "99999"), "there is no port 99999"),
    ],
)
def test_what_cannot_be(allaprima: Allaprima, words: tuple[str, ...], told: str) -> None:
    outcome = allaprima("serve", *words)
    assert outcome.code == 2
    assert told in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_port_that_is_taken(allaprima: Allaprima) -> None:
    from allaprima.serve.server import listen

    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        outcome = allaprima("serve", "--port", str(port))
    assert outcome.code == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in outcome.err


def test_a_backend_that_is_not_there(allaprima: Allaprima) -> None:
    outcome = allaprima("serve", "--port", "0", "--backend", "nothing")
    assert outcome.code == 2
    assert "allaprima: error: " in outcome.err.splitlines()[-1]
    assert "nothing" in outcome.err.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process(number: int) -> None:
    command = [sys.executable, "-m", "allaprima.cli", "serve", "--port", "0", "--backend", "ort"]
    environment = os.environ | {KEYS: "secret-key"}
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([*command, "--lanes", "1", "--threads", "1"], **options) as process:
        assert process.stderr is not None
        first = json.loads(process.stderr.readline())
        assert first["message"] == "listening"
        body = json.dumps({"prompt": "a secret", "num_inference_steps": 2}).encode()
        headers = {"x-api-key": "secret-key", "content-type": "application/json"}
        request = urllib.request.Request(f"{first['url']}/v1/images/generations", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["size"] == "128x128"
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(30) == 0
    lines = [json.loads(line) for line in rest.splitlines()]
    assert [each["status"] for each in lines if each["message"] == "request"] == [200]
    assert "secret" not in rest
