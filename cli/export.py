"""`allaprima export`: a checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from allaprima.bundle import ExportError
from allaprima.cli.output import add_quiet, progress_bar, show_bytes


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "source", metavar="CHECKPOINT", help="a diffusers folder, a .safetensors file, or a hub id"
    )
    parser.add_argument("target", metavar="BUNDLE", help="the folder to write")
    parser.add_argument(
        "--precision", choices=("fp16", "fp32", "bf16"), default="fp16", help="of the weights (default: fp16)"
    )
    parser.add_argument("--name", help="the bundle's name (default: the folder's)")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="of a single file: CLIP's tokenizer (default: from the hub)"
    )
    parser.add_argument(
        "--prediction",
        choices=("epsilon", "v_prediction"),
        help="of a single file: what the model predicts (default: what the file tells, or v_prediction for "
        "2.x and epsilon for others)",
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="open a .ckpt, if you trust where it comes from"
    )
    parser.add_argument(
        "--thresholding",
        action="store_true",
        help="make dynamic thresholding possible, if the checkpoint's scheduler does not ask for it",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="how a distilled model is sampled: turbo, lightning, lcm, tcd or flash (default: as its "
        "files say)",
    )
    parser.add_argument("--steps", metavar="N", type=int, help="the bundle's default number of steps")
    parser.add_argument("--guidance", metavar="SCALE", type=float, help="the bundle's default guidance scale")
    parser.add_argument(
        "--prior", metavar="CHECKPOINT", help="of a Kandinsky decoder: the folder or hub id of its prior"
    )
    parser.add_argument(
        "--image-encoder",
        action="store_true",
        help="of Kandinsky: put the prior's image encoder into the bundle too, for --mix with pictures and "
        "--prior-image",
    )
    parser.add_argument(
        "--text-encoder-weights",
        choices=("int8",),
        help="quantize those of the text encoders' matrix products (default: as --precision)",
    )
    parser.add_argument(
        "--step-cache",
        action="store_const",
        const=1,
        default=0,
        help="also write the graphs for --cache-interval, over the same weights",
    )
    parser.add_argument(
        "--step-cache-layers",
        dest="step_cache",
        metavar="N",
        type=int,
        help="the same, with so many layers of the UNet computed at every step: slower and closer (1)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    add_quiet(parser)


def run(options: argparse.Namespace) -> None:
    """Export, and say what came out."""
    try:
        from allaprima.export import SingleFile, Usage, export_checkpoint
    except ModuleNotFoundError as error:
        raise ExportError(
            f'export needs {error.name}, which is not installed: pip install "allaprima[export]"'
        ) from error

    with progress_bar(quiet=options.quiet) as report:
        bundle = export_checkpoint(
            options.source,
            Path(options.target),
            precision=options.precision,
            name=options.name,
            overwrite=options.force,
            single=SingleFile(options.tokenizer, options.prediction, options.allow_pickle),
            thresholding=options.thresholding,
            usage=Usage(options.preset, options.steps, options.guidance),
            prior=options.prior,
            image_encoder=options.image_encoder,
            text_encoder_weights=options.text_encoder_weights,
            step_cache=options.step_cache,
            progress=lambda progress: report("export", progress.done, progress.total, progress.stage),
        )
    if not options.quiet:
        manifest = bundle.manifest
        size = show_bytes(sum(entry.size for entry in manifest.files.values()))
        for name, component in manifest.components.items():
            if component.weights is not None:
                worst = max(parity.relative for parity in component.parity)
                print(f"{name}: {component.weights} weights, off by at most {worst:.2g} standard deviations")
        print(
            f"{options.target}: {manifest.name}, {manifest.precision}, {size} in {len(manifest.files)} files"
        )
