"""`allaprima build`: a bundle is compiled for this machine, once."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allaprima.bundle import open_bundle, resolve
from allaprima.cli.output import add_json, add_quiet, print_json, print_table, progress_bar, show_bytes

if TYPE_CHECKING:
    from allaprima.engine import Built, Options


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = (
        "Compiles a bundle for this machine. Engines go to the cache, see: allaprima cache list."
    )
    parser.add_argument(
        "bundle", metavar="BUNDLE", nargs="?", default="shapes", help="a folder or a built-in name (shapes)"
    )
    parser.add_argument("--backend", metavar="NAME", default="auto", help="see: allaprima doctor (auto)")
    parser.add_argument(
        "--precision", metavar="NAME", help="fp32, fp16 or bf16 (default: the backend's best)"
    )
    parser.add_argument(
        "--shapes",
        metavar="WxH,...",
        help="picture sizes, each compiled for itself (the model's own; with openvino two besides all)",
    )
    parser.add_argument("--batch", metavar="N|N-M", help="pictures in a batch, from N to M (1)")
    parser.add_argument(
        "--chunks",
        metavar="N",
        type=int,
        help="most chunks of 77 tokens in a prompt, for --long-prompts (1; both TensorRTs)",
    )
    parser.add_argument(
        "--target",
        metavar="CC,...",
        help="compute capabilities to compile for, as in 8.9,12.0 (8.0 and newer; tensorrt-rtx)",
    )
    parser.add_argument(
        "--components", metavar="NAME,...", help="build only these, see: allaprima inspect (all)"
    )
    parser.add_argument("--workspace", metavar="MIB", type=int, help="most scratch memory (both TensorRTs)")
    parser.add_argument("--level", type=int, help="optimisation level, 0 to 5 (both TensorRTs)")
    parser.add_argument(
        "--refit", action="store_true", help="let the weights be changed later (tensorrt 11.4 or newer)"
    )
    parser.add_argument(
        "--weight-streaming",
        action="store_true",
        help="let weights stay outside the GPU, for generate --memory-limit (both TensorRTs)",
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="another cache, to be copied to another machine"
    )
    add_json(parser)
    add_quiet(parser)


def run(options: argparse.Namespace) -> None:
    """Build what the cache lacks, and list what it now holds."""
    from allaprima.engine import build_bundle, parse_range, parse_sizes

    bundle = open_bundle(resolve(options.bundle))
    with progress_bar(quiet=options.quiet) as report:
        engines = build_bundle(
            bundle,
            backend=options.backend,
            precision=options.precision,
            sizes=parse_sizes(options.shapes) if options.shapes is not None else (),
            batch=parse_range(options.batch) if options.batch is not None else (1, 1),
            options=_tensorrt(options),
            components=_names(options.components),
            cache=options.output,
            progress=lambda progress: report("build", progress.done, progress.total, progress.stage),
        )
    if options.json:
        print_json([_to_json(built) for built in engines])
    elif not options.quiet:
        print_table(
            ("component", "backend", "precision", "size", "error against fp32", "built"), map(_row, engines)
        )
        profiles = [row for built in engines for row in _profiles(built)]
        if profiles:
            print_table(("component", "serves"), profiles)


def _names(words: str | None) -> tuple[str, ...]:
    return () if words is None else tuple(word.strip() for word in words.split(","))


def _tensorrt(options: argparse.Namespace) -> Options | None:
    """The options of the TensorRT family, None if there are none."""
    from allaprima.engine import Options

    given = options.target, options.workspace, options.level, options.chunks
    if given == (None,) * 4 and not (options.refit or options.weight_streaming):
        return None
    targets = tuple(word.strip() for word in options.target.split(",")) if options.target is not None else ()
    workspace = None if options.workspace is None else options.workspace * 2**20
    return Options(
        targets,
        workspace,
        options.level,
        options.refit,
        1 if options.chunks is None else options.chunks,
        options.weight_streaming,
    )


def _to_json(built: Built) -> dict[str, Any]:
    engine = built.engine.to_json()
    return {"folder": str(built.folder), "reused": built.reused, "reason": built.reason, **engine}


def _row(built: Built) -> tuple[str, ...]:
    engine = built.engine
    error = "not run here" if engine.error is None else f"{engine.error:.1e} of the deviation"
    how = "before" if built.reused else f"in {engine.build_seconds:.1f} s"
    why = f" ({built.reason})" if built.reason else ""
    return (
        built.component,
        engine.key.backend,
        engine.key.precision,
        show_bytes(engine.size),
        error,
        how + why,
    )


def _profiles(built: Built) -> Iterator[tuple[str, str]]:
    for profile in built.engine.key.profiles:
        yield built.component, profile.words()
