"""HTTP/1.1 as uvicorn speaks it, for clients that may be slow or mean no good."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0
"""In which the head of a request must be here; of its body the application knows."""


BODY_SECONDS = 60.0
"""In which the rest of a body must be here that nobody reads, since the answer was given before."""
READ_SECONDS = 60.0
"""In which some of an answer must be taken that does not fit into the buffers of the system."""


class PatientProtocol(H11Protocol):
    """Hangs up on who sends no request, or a part of its head only: uvicorn would wait for ever.

    So too on who goes on with a body after the answer, and on who takes nothing of an answer.
    """

    head_seconds, body_seconds, read_seconds = HEAD_SECONDS, BODY_SECONDS, READ_SECONDS
    _due: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._watch_sender()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        self._watch_sender()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._forget()
        self._forget_reader()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """See uvicorn's protocol."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._watch_sender()
        if self.transport.is_closing():
            self._watch_reader()

    def pause_writing(self) -> None:
        """See asyncio.Protocol: the buffers are full."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._forget_reader()
        super().resume_writing()
        if self.transport.is_closing():
            self._watch_reader()

    def _watch_reader(self, before: int | None = None) -> None:
        """See whether there is less left to be taken than `before`, and again after a while."""
        self._forget_reader()
        size = self.transport.get_write_buffer_size()
        if before is not None and size >= before:
            self.transport.abort()
        elif size:
            self._unread = self.loop.call_later(self.read_seconds, self._watch_reader, size)

    def _forget_reader(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _watch_sender(self) -> None:
        """Wait for the head of a request, or the rest of a body that nobody reads."""
        ours, theirs = self.conn.our_state, self.conn.their_state
        if theirs is h11.IDLE:
            seconds = self.head_seconds
        elif theirs is h11.SEND_BODY and ours in (h11.DONE, h11.MUST_CLOSE):
            seconds = self.body_seconds
        else:
            self._forget()
            return
        if self._due is None:
            self._due = self.loop.call_later(seconds, self.transport.close)

    def _forget(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
