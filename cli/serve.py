"""`allaprima serve`: pictures over HTTP, for many users at once."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from allaprima.bundle import RequestError
from allaprima.cli.output import parse_size, print_warnings

if TYPE_CHECKING:
    from allaprima.runtime import Pipeline
    from allaprima.serve.limits import Limits
    from allaprima.serve.settings import ServerSettings

USUAL_STEPS = 50
"""That a picture of the largest size may have."""
KEYS = "ALLAPRIMA_API_KEY"
"""The variable with API keys, separated by commas."""
_PACKAGES = ("fastapi", "prometheus_client", "pydantic", "python_multipart", "starlette", "uvicorn")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = (
        "Serves pictures over HTTP: to clients of OpenAI's Images API, and by jobs of its own. The log goes "
        "to stderr, as JSON. SIGTERM lets it finish what it paints."
    )
    parser.add_argument(
        "bundles",
        metavar="BUNDLE",
        nargs="*",
        help="folders or built-in names, the first is the default model (shapes)",
    )
    _add_door(parser)
    _add_models(parser)
    _add_limits(parser)


def _add_door(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who may use it")
    add = group.add_argument
    add("--host", metavar="NAME", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", metavar="N", type=int, default=8000, help="0 is one that is free (8000)")
    add(
        "--api-key",
        metavar="KEY",
        action="append",
        default=[],
        help=f"let in who sends it; may be repeated. Better in {KEYS}: others see a command line",
    )
    add("--insecure", action="store_true", help="listen beyond this machine without any API key")
    add(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="without API keys, a name by which the server may be called, besides localhost and its address",
    )
    add("--log-prompts", action="store_true", help="write prompts to the log")


def _add_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the models")
    add = group.add_argument
    add("--backend", metavar="NAME", default="auto", help="see: allaprima doctor (default: auto)")
    add("--precision", metavar="NAME", help="fp32, fp16 or bf16 (default: the backend's best)")
    add("--threads", metavar="N", type=int, help="CPU threads (default: the backend's choice)")
    add(
        "--memory-limit",
        metavar="BYTES",
        help="of all models together, as 8GB or 8GiB: the least recently used are let go",
    )
    add(
        "--warm",
        metavar="WxH,...",
        type=_parse_sizes,
        help="sizes to be ready for before the first request, as 512x512,768x512 (the model's own)",
    )
    add(
        "--lanes",
        metavar="N",
        type=_parse_count,
        help="pictures of one size that are painted together (default: measured)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    add = group.add_argument
    add("--queue", metavar="N", type=_parse_count, help="pictures that may wait (64)")
    add("--deadline", metavar="SECONDS", type=_parse_deadline, help="of a job that does not say (600)")
    add("--max-images", metavar="N", type=_parse_count, help="pictures of one request (8)")
    add("--max-steps", metavar="N", type=_parse_count, help="denoising steps of one request (150)")
    add(
        "--max-pixels",
        metavar="WxH",
        type=parse_size,
        help="of one picture, whatever its sides (2048x2048)",
    )
    add("--max-upload", metavar="BYTES", help="of one request's body, as 20MiB (20MiB)")
    add(
        "--drain",
        metavar="SECONDS",
        type=_parse_seconds,
        default=60.0,
        help="to finish what runs after SIGTERM (60)",
    )


def run(options: argparse.Namespace) -> None:
    """Serve until a signal comes."""
    try:
        from allaprima.serve.app import create_app
        from allaprima.serve.logs import start_logging
        from allaprima.serve.metrics import Metrics
        from allaprima.serve.server import listen, serve
        from allaprima.serve.studio import Studio
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        raise RequestError(
            f'serve needs {error.name}, which is not installed: pip install "allaprima[serve]"'
        ) from error
    from allaprima.runtime.footprint import parse_bytes

    settings = read_settings(options)
    metrics, memory = Metrics(), options.memory_limit
    studio = Studio(
        options.bundles or ["shapes"],
        partial(_open, options),
        limits=settings.limits,
        memory_limit=None if memory is None else parse_bytes("memory_limit", memory),
        lanes=options.lanes,
        warm=options.warm,
        watch=metrics,
    )
    app = create_app(studio, settings, metrics)
    with listen(options.host, options.port) as listener:
        start_logging()
        serve(app, listener, drain_seconds=options.drain)


def _open(options: argparse.Namespace, folder: Path, memory_limit: int | None) -> Pipeline:
    """A pipeline of a bundle, within a memory limit in bytes."""
    from allaprima.runtime import Pipeline

    return Pipeline.open(
        folder,
        backend=options.backend,
        precision=options.precision,
        threads=options.threads,
        memory_limit=memory_limit,
    )


def read_settings(options: argparse.Namespace) -> ServerSettings:
    """Who is let in, and how much they may ask. Raises RequestError for a server that all may reach."""
    from allaprima.serve.server import is_loopback
    from allaprima.serve.settings import ServerSettings

    keys = tuple(options.api_key)
    if not keys:
        keys = tuple(key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip())
    local = is_loopback(options.host)
    if not keys and not local:
        if not options.insecure:
            raise RequestError(
                f"{options.host} can be reached from other machines: give an API key in {KEYS}, or listen on "
                "127.0.0.1; --insecure lets everybody in"
            )
        print_warnings([f"everybody who reaches {options.host} can use this server"])
    named = () if local else (options.host,)
    hosts = None if keys else tuple(name.lower() for name in ("localhost", *named, *options.allow_host))
    return ServerSettings(
        api_keys=keys, hosts=hosts, limits=_read_limits(options), log_prompts=options.log_prompts
    )


def _read_limits(options: argparse.Namespace) -> Limits:
    from allaprima.runtime.footprint import parse_bytes
    from allaprima.serve.limits import Limits

    pixels, upload = options.max_pixels, options.max_upload
    usual = Limits()
    given = {
        "queue": options.queue,
        "deadline": options.deadline,
        "most_deadline": max(usual.most_deadline, options.deadline or 0.0),
        "work": max(usual.work, USUAL_STEPS * pixels[0] * pixels[1]) if pixels else None,
        "images": options.max_images,
        "steps": options.max_steps,
        "pixels": None if pixels is None else pixels[0] * pixels[1],
        "upload_bytes": None if upload is None else parse_bytes("max_upload", upload),
    }
    return Limits(**{name: value for name, value in given.items() if value is not None})


def _parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Height and width of each of "512x512,768x512"."""
    sizes = (parse_size(word.strip()) for word in text.split(","))
    return tuple((height, width) for width, height in sizes)


def _parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' should be a whole number of at least 1")
    return int(text)


def _parse_deadline(text: str) -> float:
    seconds = _parse_seconds(text)
    if seconds == 0:
        raise argparse.ArgumentTypeError(f"'{text}' should be more than 0 seconds")
    return seconds


def _parse_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f"'{text}' should be a number of seconds")
    return seconds
