"""What a server refuses beyond what the runtime refuses."""

from __future__ import annotations

from allaprima.bundle import AllaprimaError, RequestError


class UnknownModelError(RequestError):
    """There is no model of that name here."""


class OverLimitError(RequestError):
    """The request asks for more than the server allows."""


class BusyError(AllaprimaError):
    """The queue is full; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DrainingError(AllaprimaError):
    """The server is about to stop and takes nothing new, or stopped before a job was done."""


class CancelledError(AllaprimaError):
    """The job was cancelled."""


class DeadlineError(AllaprimaError):
    """The job was not done in the time that its sender gave it."""
