"""HTTP/1.1 as uvicorn speaks it, for clients that may be slow or mean no good."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0
"""In which the head of a request must be here; of its body the application knows."""


READ_SECONDS = 30.0
"""In which a part of an answer must be taken that does not fit into the buffers of the system."""


class PatientProtocol(H11Protocol):
    """Hangs up on who sends no request, or a part of its head only: uvicorn would wait for ever.

    So too on who goes on with a body after the answer, and on who takes nothing of an answer.
    """

    head_seconds, read_seconds = HEAD_SECONDS, READ_SECONDS
    _due: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._forget()
        self._forget_reader()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """See uvicorn's protocol."""
        super().on_response_complete()
        self._watch_head()

    def pause_writing(self) -> None:
        """See asyncio.Protocol: the buffers are full."""
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._forget_reader()
        super().resume_writing()

    def _watch_reader(self, before: int) -> None:
        size = self.transport.get_write_buffer_size()
        if size >= before:
            self.transport.abort()
        else:
            self._unread = self.loop.call_later(self.read_seconds, self._watch_reader, size)

    def _forget_reader(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _watch_head(self) -> None:
        answered = self.conn.our_state in (h11.DONE, h11.MUST_CLOSE)
        if self.conn.their_state is not h11.IDLE and not (
            answered and self.conn.their_state is h11.SEND_BODY
        ):
            self._forget()
        elif self._due is None:
            self._due = self.loop.call_later(self.head_seconds, self.transport.close)

    def _forget(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
