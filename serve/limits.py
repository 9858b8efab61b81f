"""What one request, and all together, may ask of a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """`pixels` of one picture, `work` is pictures x steps x pixels, `prompt_bytes` those of one text in
    UTF-8. `upload_bytes` bounds the body of an HTTP request, `upload_pixels` each picture in it.

    `queue` bounds the pictures that wait, `deadline` and `most_deadline` are the seconds that a job has if
    its sender says nothing, and at most. `kept` jobs that ended can be asked for, for `kept_seconds`.
    """

    images: int = 8
    steps: int = 150
    pixels: int = 2048 * 2048
    work: int = 8 * 50 * 1024 * 1024
    prompt_bytes: int = 16 << 10
    upload_bytes: int = 20 << 20
    upload_pixels: int = 1 << 24
    queue: int = 64
    deadline: float = 600.0
    most_deadline: float = 3600.0
    kept: int = 64
    kept_seconds: float = 900.0
