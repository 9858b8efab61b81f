"""The process: a socket, an event loop, and an end in good order."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from allaprima.bundle import AllaprimaError, BackendError, RequestError
from allaprima.serve.context import Context
from allaprima.serve.protocol import PatientProtocol

_log = logging.getLogger("allaprima.serve")
_KEEP_ALIVE_SECONDS = 30
_LAST_WORDS_SECONDS = 5
"""For answers that are on their way when nothing is painted any more."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; the port 0 is one that is free.

    Raises RequestError: no such host, or the port is taken.
    """
    try:
        family, _, _, _, address = _addresses(host, port)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else cause
        raise RequestError(
            f"cannot listen on {host} port {port}: {reason}; choose others with --host and --port"
        ) from cause


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host. Raises RequestError if there is none of that name."""
    try:
        found = _addresses(host, 0)
    except OSError as cause:
        raise RequestError(f"there is no host {host}: {cause.strerror}") from cause
    return all(ipaddress.ip_address(str(each[4][0]).partition("%")[0]).is_loopback for each in found)


def serve(app: FastAPI, listener: socket.socket, *, drain_seconds: float) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish what runs; a second signal stops at once.

    What waits, and what comes meanwhile, is refused with 503, and so is what still runs after
    `drain_seconds`. A studio that can no longer paint ends it too. Raises BackendError, or what the studio
    failed with.
    """
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    _log.info("listening", extra={"facts": {"url": f"http://{shown}:{port}"}})
    Server(app, drain_seconds).run(sockets=[listener])
    failure = app.state.context.studio.failure
    if isinstance(failure, AllaprimaError):
        raise failure
    if failure is not None:
        raise BackendError("the server can no longer paint: its log says why") from failure


class Server(uvicorn.Server):
    """Uvicorn's, that keeps answering while the studio drains."""

    def __init__(self, app: FastAPI, drain_seconds: float) -> None:
        config = uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
        )
        super().__init__(config)
        self._context: Context = app.state.context
        self._drain_seconds = drain_seconds
        self._told_ready = False

    async def on_tick(self, counter: int) -> bool:
        """Whether to end, asked ten times a second."""
        studio = self._context.studio
        if studio.failure is not None:
            _log.error("the studio failed", exc_info=studio.failure)
            self.should_exit = True
        elif studio.ready and not self._told_ready:
            self._told_ready = True
            _log.info("ready", extra={"facts": {"models": [model.name for model in studio.models()]}})
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal. Uvicorn would also raise it again at the end, and the exit code tell of a crash."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then do as uvicorn does."""
        studio, until = self._context.studio, time.monotonic() + self._drain_seconds
        _log.info("draining", extra={"facts": {"running": studio.load().running}})
        await asyncio.to_thread(studio.drain)
        while studio.load().running and time.monotonic() < until and not self.force_exit:
            await asyncio.sleep(0.05)
        if studio.load().running and not self.force_exit:
            await asyncio.to_thread(studio.close, 0)
        await super().shutdown(sockets)


def _addresses(host: str, port: int) -> list[tuple[int, int, int, str, tuple[str | int, ...]]]:
    return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))  # type: ignore[arg-type]
