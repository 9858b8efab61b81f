"""`allaprima build`: a bundle is compiled for this machine, once."""

from __future__ import annotations

import argparse

from allaprima.bundle import open_bundle, resolve
from allaprima.cli.output import add_json, add_quiet, print_json, print_table, progress_bar, show_bytes


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
    add_json(parser)
    add_quiet(parser)


def run(options: argparse.Namespace) -> None:
    """Build what the cache lacks, and list what it now holds."""
    from allaprima.engine import build_bundle

    bundle = open_bundle(resolve(options.bundle))
    with progress_bar(quiet=options.quiet) as report:
        engines = build_bundle(
            bundle,
            backend=options.backend,
            precision=options.precision,
            progress=lambda progress: report("build", progress.done, progress.total, progress.stage),
        )
    if options.json:
        print_json(
            [
                {"folder": str(built.folder), "reused": built.reused, **built.engine.to_json()}
                for built in engines
            ]
        )
    elif not options.quiet:
        print_table(
            ("component", "backend", "precision", "size", "error against fp32", "built"),
            [
                (
                    built.component,
                    built.engine.key.backend,
                    built.engine.key.precision,
                    show_bytes(built.engine.size),
                    f"{built.engine.error:.1e} of the deviation",
                    "before" if built.reused else f"in {built.engine.build_seconds:.1f} s",
                )
                for built in engines
            ],
        )
