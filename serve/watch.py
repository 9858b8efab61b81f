"""What a studio tells of its work, for metrics and logs."""

from __future__ import annotations

from typing import Protocol

from allaprima.serve.jobs import Job


class Watch(Protocol):
    """Takes note; called on the studio's thread, so it must be quick."""

    def stepped(self, model: str, height: int, width: int, lanes: int, seconds: float) -> None:
        """So many pictures of a size took a step together."""

    def staged(self, model: str, stage: str, seconds: float) -> None:
        """A picture was prepared ("encode") or decoded ("decode")."""

    def ended(self, job: Job) -> None:
        """A job ended: its status says how."""


class Nobody:
    """Takes no note."""

    def stepped(self, model: str, height: int, width: int, lanes: int, seconds: float) -> None:
        """See Watch."""

    def staged(self, model: str, stage: str, seconds: float) -> None:
        """See Watch."""

    def ended(self, job: Job) -> None:
        """See Watch."""


NOBODY = Nobody()
