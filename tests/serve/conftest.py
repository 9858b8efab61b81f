"""A real server on a free port, over a studio that is a stand-in."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from allaprima.bundle import builtin_bundle
from allaprima.serve.app import create_app
from allaprima.serve.limits import Limits
from allaprima.serve.server import Server, listen
from allaprima.serve.settings import ServerSettings

from .fakes import FakeStudio

LIMITS = Limits(upload_bytes=1 << 20, upload_pixels=1 << 20)


class Running:
    """A server that runs: its address, its studio, and itself."""

    def __init__(self, url: str, studio: Any, server: Server) -> None:
        self.url, self.studio, self.server = url, studio, server

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, **options)


@contextmanager
def running(
    studio: Any, settings: ServerSettings, drain_seconds: float = 10, app: FastAPI | None = None
) -> Iterator[Running]:
    with listen("127.0.0.1", 0) as listener:
        host, port = listener.getsockname()
        server = Server(app or create_app(studio, settings), drain_seconds)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        until(lambda: server.started)
        try:
            yield Running(f"http://{host}:{port}", studio, server)
        finally:
            if isinstance(studio, FakeStudio):
                studio.go()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def until(true: Callable[[], object], seconds: float = 10) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def submit_raw(url: str, *parts: str | bytes, pause: float = 0) -> str:
    """Send bytes as they are, and read what comes until the server hangs up."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        for part in parts:
            connection.sendall(part.encode() if isinstance(part, str) else part)
            time.sleep(pause)
        found = b""
        with suppress(ConnectionResetError):
            while data := connection.recv(1 << 16):
                found += data
    return found.decode("latin-1")


@pytest.fixture
def copies(tmp_path: Path) -> Callable[[str], Path]:
    """Copies of `shapes` by other names."""

    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for path in builtin_bundle("shapes").rglob("*"):
            if path.is_file():
                target = folder / path.relative_to(builtin_bundle("shapes"))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        manifest = folder / "bundle.json"
        manifest.write_text(manifest.read_text().replace('"name": "shapes"', f'"name": "{name}"', 1))
        return folder

    return copy


Serve = Callable[..., Running]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(studio=..., **settings): a server of its own."""
    with ExitStack() as stack:

        def start(studio: FakeStudio | None = None, drain_seconds: float = 10, **settings: Any) -> Running:
            studio = FakeStudio(limits=settings.get("limits", LIMITS)) if studio is None else studio
            chosen = ServerSettings(**{"limits": LIMITS, **settings})
            return stack.enter_context(running(studio, chosen, drain_seconds))

        yield start


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """A server that the tests of a module share, if they leave it as it was."""
    with running(FakeStudio(("shapes", "other"), LIMITS), ServerSettings(limits=LIMITS)) as server:
        yield server


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    """The shared one, with nothing to do before and after."""
    studio = shared.studio
    studio.fails = studio.busy = None
    studio.seconds = 0.0
    studio.asked.clear()
    yield shared
    studio.go()
    until(lambda: not studio.jobs())


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    """Speaks to the shared server."""
    with server.client() as client:
        yield client
