"""What one request, and all together, may ask of a server."""

from __future__ import annotations

from dataclasses import dataclass

from allaprima.runtime import Settings
from allaprima.serve.errors import OverLimitError

MOST = 2**31 - 1
"""Of any whole number in a request but seeds: what is larger is a mistake, or no good."""


@dataclass(frozen=True)
class Limits:
    """`pixels` of one picture, `work` is pictures x steps x pixels, `prompt_bytes` those of one text in
    UTF-8. `upload_bytes` bounds the body of an HTTP request, `upload_pixels` each picture in it, and
    `uploads_bytes` the bodies of all requests together.

    `queue` bounds the pictures that wait, `queue_bytes` what they begin with, unpacked; `deadline` and
    `most_deadline` are the seconds that a job has if its sender says nothing, and at most. `kept` jobs that
    ended can be asked for, for `kept_seconds`, if their pictures take no more than `kept_bytes` in memory
    together.
    """

    images: int = 8
    steps: int = 150
    pixels: int = 2048 * 2048
    work: int = 8 * 50 * 1024 * 1024
    prompt_bytes: int = 16 << 10
    upload_bytes: int = 20 << 20
    upload_pixels: int = 1 << 24
    uploads_bytes: int = 256 << 20
    queue: int = 64
    queue_bytes: int = 1 << 30
    deadline: float = 600.0
    most_deadline: float = 3600.0
    kept: int = 64
    kept_seconds: float = 900.0
    kept_bytes: int = 256 << 20


def check_limits(limits: Limits, settings: Settings, calls: int | None = None) -> None:
    """Raises OverLimitError naming the value and what is allowed.

    `calls` of the denoiser count as steps in the product, where they are known: some samplers take two a
    step.
    """
    pixels = settings.height * settings.width
    prior = settings.prior_num_inference_steps or 0
    steps = settings.num_inference_steps + prior
    work = settings.num_images * ((calls or settings.num_inference_steps) + prior) * pixels
    texts = (settings.prompt, settings.negative_prompt, settings.prompt_2, settings.negative_prompt_2)
    longest = max(len((text or "").encode(errors="replace")) for text in texts)
    for name, value, most in (
        ("num_images", settings.num_images, limits.images),
        ("num_inference_steps", steps, limits.steps),
        ("height x width", pixels, limits.pixels),
        ("a prompt's bytes", longest, limits.prompt_bytes),
        ("pictures waiting", settings.num_images, limits.queue),
        ("pictures x steps x pixels", work, limits.work),
    ):
        if value > most:
            raise OverLimitError(f"{name} is {value}, more than this server allows: ask for at most {most}")
