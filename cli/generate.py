"""`allaprima generate`: pictures from a prompt."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from allaprima.cli.output import add_json, add_quiet, print_json, print_warnings, progress_bar

if TYPE_CHECKING:
    from allaprima.runtime import Result


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments; options keep the bundle's defaults when left out."""
    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        nargs="?",
        default="shapes",
        help="a folder or a built-in name (default: shapes)",
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to paint")
    _add_painting(parser)
    _add_pictures(parser)
    parser.add_argument(
        "--backend", metavar="NAME", default="auto", help="see: allaprima doctor (default: auto)"
    )
    parser.add_argument(
        "--precision", metavar="NAME", help="fp32, fp16 or bf16 (default: the backend's best)"
    )
    parser.add_argument(
        "--threads", metavar="N", type=int, help="CPU threads (default: the backend's choice)"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default="picture.png",
        help="numbered if there are several (picture.png)",
    )
    parser.add_argument(
        "--no-safety-checker", action="store_true", help="do not let the model's safety checker look"
    )
    add_json(parser)
    add_quiet(parser)


def _add_painting(parser: argparse.ArgumentParser) -> None:
    """What and how to paint."""
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what to stay away from")
    parser.add_argument("--steps", metavar="N", type=int, help="denoising steps")
    parser.add_argument(
        "--guidance", metavar="SCALE", type=float, help="how strictly to follow the prompt; 1 is off"
    )
    parser.add_argument("--sampler", metavar="NAME", help="see: allaprima samplers")
    parser.add_argument("--seed", metavar="N", type=int, help="of the first picture (default: random)")
    parser.add_argument(
        "--size", metavar="WxH", type=_parse_size, default=(None, None), help="in pixels, as 768x512"
    )
    parser.add_argument(
        "-n", "--num-images", metavar="N", type=int, default=1, help="each with the next seed"
    )
    parser.add_argument(
        "--eta", metavar="X", type=float, default=0.0, help="DDIM's share of fresh noise, 0 to 1"
    )
    parser.add_argument(
        "--long-prompts", action="store_true", help="keep what does not fit into 77 tokens, in chunks"
    )
    parser.add_argument(
        "--prompt-weights", action="store_true", help="read (word:1.3), (word) and [word] as weights"
    )
    parser.add_argument(
        "--clip-skip", metavar="N", type=int, help="last layers of the text encoder to leave out (0)"
    )
    parser.add_argument(
        "--guidance-rescale", metavar="X", type=float, default=0.0, help="tames strong guidance, 0 to 1"
    )


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    """What to begin with."""
    parser.add_argument(
        "--variation-strength", metavar="X", type=float, default=0.0, help="how far to vary the seed, 0 to 1"
    )
    parser.add_argument("--variation-seed", metavar="N", type=int, help="towards which (default: random)")
    parser.add_argument(
        "--image", metavar="FILE", help="a picture to begin with; its size is taken if --size does not say"
    )
    parser.add_argument("--mask", metavar="FILE", help="where to paint over it: white; what is black stays")
    parser.add_argument(
        "--strength",
        metavar="X",
        type=float,
        help="how much to paint over, 0 to 1 (0.8; with a mask 1)",
    )


def run(options: argparse.Namespace) -> None:
    """Paint, save, and say where."""
    from allaprima.runtime import Pipeline, check_writable, save_image

    paths = _name_outputs(Path(options.output), options.num_images)
    for path in paths:
        check_writable(path)
    width, height = options.size
    with (
        Pipeline.open(
            options.bundle,
            backend=options.backend,
            precision=options.precision,
            threads=options.threads,
            safety_checker=not options.no_safety_checker,
        ) as pipeline,
        progress_bar(quiet=options.quiet) as report,
    ):
        result = pipeline.generate(
            options.prompt,
            negative_prompt=options.negative_prompt,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            sampler=options.sampler,
            seed=options.seed,
            height=height,
            width=width,
            num_images=options.num_images,
            eta=options.eta,
            long_prompts=options.long_prompts,
            prompt_weights=options.prompt_weights,
            clip_skip=options.clip_skip,
            guidance_rescale=options.guidance_rescale,
            image=options.image,
            strength=options.strength,
            variation_seed=options.variation_seed,
            variation_strength=options.variation_strength,
            mask=options.mask,
            callback=lambda progress: report(progress.stage, progress.step, progress.total),
        )
    for path, image, parameters in zip(paths, result.images, result.parameters, strict=True):
        save_image(image, path, parameters)
    _tell(options, paths, result)


def _tell(options: argparse.Namespace, paths: list[Path], result: Result) -> None:
    pictures = [
        {"path": str(path), **asdict(parameters)}
        for path, parameters in zip(paths, result.parameters, strict=True)
    ]
    if options.json:
        print_json({"images": pictures, "timings": dict(result.timings), "warnings": list(result.warnings)})
    if options.quiet:
        return
    print_warnings(result.warnings)
    if not options.json:
        for path, parameters in zip(paths, result.parameters, strict=True):
            print(f"{path}  seed {parameters.seed}")
        print(f"{result.timings['total']:.2f} s on {parameters.backend} in {parameters.precision}")


def _parse_size(text: str) -> tuple[int, int]:
    width, separator, height = text.lower().partition("x")
    if not (separator and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size: write WIDTHxHEIGHT in pixels, as 768x512")
    return int(width), int(height)


def _name_outputs(output: Path, count: int) -> list[Path]:
    """picture.png for one picture, picture-1.png, picture-2.png, ... for several."""
    if count <= 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{index}") for index in range(1, count + 1)]
