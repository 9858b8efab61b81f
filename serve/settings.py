"""How the HTTP server behaves."""

from __future__ import annotations

from dataclasses import dataclass, field

from allaprima.serve.limits import Limits


@dataclass(frozen=True)
class ServerSettings:
    """`api_keys` that are let in; none is everybody.

    `hosts` are the names, besides IP addresses, by which a client may call the server: a page of another
    site cannot reach an open server on the user's own machine by a name that it made up. None is any.
    `upload_seconds` is the time in which the body of a request must be here. Pictures that are handed out by
    URL are kept in memory: at most `files`, of `files_bytes` together, for `files_seconds`.
    `heartbeat_seconds` is the longest silence on a stream of events. `log_prompts` writes prompts to the log.
    """

    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    limits: Limits = field(default_factory=Limits)
    upload_seconds: float = 60.0
    files: int = 256
    files_bytes: int = 256 << 20
    files_seconds: float = 3600.0
    heartbeat_seconds: float = 15.0
    log_prompts: bool = False
