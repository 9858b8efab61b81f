"""`allaprima quantize`: a bundle whose denoiser computes in int8."""

from __future__ import annotations

import argparse
from pathlib import Path

from allaprima.bundle import BuildError, RequestError, open_bundle, resolve
from allaprima.cli.output import add_json, add_quiet, parse_size, print_json, progress_bar, show_bytes


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = (
        "Writes a bundle whose denoiser computes its large layers in int8: faster where the processor has "
        "instructions for it, and another picture. Ranges are those of pictures that the bundle paints."
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder or a built-in name")
    parser.add_argument("target", metavar="OUT", help="the new bundle's folder")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="of the kind that will be painted")
    parser.add_argument("--captions", metavar="FILE", type=Path, help="more prompts, one a line")
    parser.add_argument(
        "--samples", metavar="N", type=int, default=8, help="pictures that are painted to see ranges (8)"
    )
    parser.add_argument("--steps", metavar="N", type=int, help="of each (the bundle's)")
    parser.add_argument("--guidance", metavar="SCALE", type=float, help="of each (the bundle's)")
    parser.add_argument("--size", metavar="WxH", type=parse_size, help="of each, in pixels (the bundle's)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the first (0)")
    parser.add_argument("--backend", metavar="NAME", default="auto", help="to paint with: openvino or ort")
    parser.add_argument("--threads", metavar="N", type=int, help="of the backend (its own choice)")
    parser.add_argument(
        "--max-error",
        metavar="SHARE",
        type=float,
        help="leave those layers in float that cost most, until predictions are off by about this share of "
        "their deviation, as 0.03 (default: none; takes three runs for each group of layers)",
    )
    parser.add_argument("--name", help="what the bundle calls itself (the name of BUNDLE with -int8)")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    add_json(parser)
    add_quiet(parser)


def run(options: argparse.Namespace) -> None:
    """Quantize, and say what it cost."""
    try:
        from allaprima.engine.calibration import Calibration
        from allaprima.engine.quantize import quantize_bundle
    except ModuleNotFoundError as error:
        raise BuildError(
            f'quantize needs {error.name}, which is not installed: pip install "allaprima[quantize]"'
        ) from error

    width, height = options.size or (None, None)
    calibration = Calibration(
        (*options.prompts, *_read(options.captions)),
        options.samples,
        options.steps,
        options.guidance,
        height,
        width,
        options.seed,
    )
    source = open_bundle(resolve(options.bundle))
    with progress_bar(quiet=options.quiet) as report:
        bundle = quantize_bundle(
            source,
            Path(options.target),
            calibration,
            name=options.name,
            backend=options.backend,
            threads=options.threads,
            most=options.max_error,
            overwrite=options.force,
            progress=lambda progress: report("quantize", progress.done, progress.total, progress.stage),
        )
    made = bundle.component("denoiser").quantization
    assert made is not None
    if options.json:
        print_json({"folder": str(bundle.folder), "name": bundle.manifest.name, **made.to_json()})
    elif not options.quiet:
        size = show_bytes(sum(entry.size for entry in bundle.manifest.files.values()))
        print(
            f"{options.target}: {bundle.manifest.name}, {made.layers} of {made.total} layers of the denoiser "
            f"in {made.dtype}, off by {made.error:.2g} standard deviations, {size}"
        )


def _read(file: Path | None) -> tuple[str, ...]:
    """The lines of a file that are not empty. Raises RequestError."""
    if file is None:
        return ()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} cannot be read: {error}") from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise RequestError(f"{file} has no captions: write one a line")
    return found
