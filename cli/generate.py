"""`allaprima generate`: pictures from a prompt."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allaprima.bundle import open_bundle, resolve
from allaprima.cli.output import (
    add_json,
    add_quiet,
    parse_size,
    print_json,
    print_warnings,
    progress_bar,
    show_bytes,
)
from allaprima.cli.prior import add_prior, read_prior
from allaprima.cli.sampling import add_sampling, read_sampling
from allaprima.cli.xl import add_xl, for_refiner, joined, read_xl

if TYPE_CHECKING:
    from allaprima.runtime import MemoryUse, Progress, Result


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments; options keep the bundle's defaults when left out."""
    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        nargs="?",
        help="a folder or a built-in name (default: shapes)",
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to paint; left out with --mix")
    _add_painting(parser)
    _add_pictures(parser)
    add_sampling(parser)
    add_xl(parser)
    add_prior(parser)
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
        "--memory-limit",
        metavar="BYTES",
        help="load the parts of the model one after the other, if they do not fit together, as 8GB or 8GiB",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default="picture.png",
        help="numbered if there are several (picture.png)",
    )
    parser.add_argument(
        "--preview",
        metavar="FILE",
        help="a small picture of what is being painted, meanwhile (picture.preview.png)",
    )
    parser.add_argument(
        "--preview-every", metavar="N", type=int, help="write it after every N steps (with --preview: 1)"
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
        "--size", metavar="WxH", type=parse_size, default=(None, None), help="in pixels, as 768x512"
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
        "--cache-interval",
        metavar="N",
        type=int,
        default=1,
        help="compute the model in full at every N-th step only: faster, another picture (1: off)",
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
    from allaprima.runtime import Pipeline, check_writable, save_image, save_preview
    from allaprima.runtime.step_cache import read_interval

    _settle_bundle(options)
    paths = _name_outputs(Path(options.output), options.num_images)
    every, small = _previews(options)
    for path in (*paths, *small):
        check_writable(path)
    asked = _asked(options)
    if options.refiner is not None:
        refiner = open_bundle(resolve(options.refiner))  # before the base has painted for nothing
        read_interval(options.cache_interval, refiner.manifest)
    with progress_bar(quiet=options.quiet) as report:

        def callback(progress: Progress) -> None:
            report(progress.stage, progress.step, progress.total)
            # None where none is due.
            for path, image in zip(small, progress.previews, strict=False):
                save_preview(image, path)

        def paint(bundle: str, request: dict[str, Any]) -> Result:
            with Pipeline.open(
                bundle,
                backend=options.backend,
                precision=options.precision,
                threads=options.threads,
                safety_checker=not options.no_safety_checker,
                memory_limit=options.memory_limit,
            ) as pipeline:
                return pipeline.generate(**request, callback=callback, preview_every=every)

        result = paint(options.bundle, asked)
        if options.refiner is not None:
            result = joined(result, paint(options.refiner, for_refiner(options, asked, result)))
    for path, image, parameters in zip(paths, result.images, result.parameters, strict=True):
        save_image(image, path, parameters)
    _tell(options, paths, result)


def _settle_bundle(options: argparse.Namespace) -> None:
    """Beside a mix, which is in place of the prompt, a single word is the bundle."""
    if options.bundle is None and options.mix:
        options.bundle, options.prompt = options.prompt, ""
    elif options.bundle is None:
        options.bundle = "shapes"


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the request."""
    width, height = options.size
    return {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "sampler": options.sampler,
        "seed": options.seed,
        "height": height,
        "width": width,
        "num_images": options.num_images,
        "eta": options.eta,
        "long_prompts": options.long_prompts,
        "prompt_weights": options.prompt_weights,
        "clip_skip": options.clip_skip,
        "guidance_rescale": options.guidance_rescale,
        "image": options.image,
        "strength": options.strength,
        "variation_seed": options.variation_seed,
        "variation_strength": options.variation_strength,
        "mask": options.mask,
        "sampling": read_sampling(options),
        "cache_interval": options.cache_interval,
        **read_xl(options),
        **read_prior(options),
    }


def _show_memory(memory: MemoryUse) -> str:
    """What was done for a limit, in words."""
    told = f"memory: about {show_bytes(memory.peak)} at most, of {show_bytes(memory.limit)}"
    if memory.loaded:
        told += f"; {memory.seconds:.1f} s to load {', '.join(memory.loaded)}"
    if memory.unloaded:
        told += f"; unloaded {', '.join(memory.unloaded)}"
    return told


def _tell(options: argparse.Namespace, paths: list[Path], result: Result) -> None:
    pictures = [
        {"path": str(path), **asdict(parameters)}
        for path, parameters in zip(paths, result.parameters, strict=True)
    ]
    if options.json:
        told: dict[str, Any] = {"timings": dict(result.timings), "warnings": list(result.warnings)}
        if result.memory is not None:
            told["memory"] = asdict(result.memory)
        print_json({"images": pictures, **told})
    if options.quiet:
        return
    print_warnings(result.warnings)
    if not options.json:
        for path, parameters in zip(paths, result.parameters, strict=True):
            print(f"{path}  seed {parameters.seed}")
        print(f"{result.timings['total']:.2f} s on {parameters.backend} in {parameters.precision}")
        if result.memory is not None:
            print(_show_memory(result.memory))


def _previews(options: argparse.Namespace) -> tuple[int | None, list[Path]]:
    """After how many steps previews are written, None for never, and where."""
    if options.preview is None and not options.preview_every:
        return None, []
    output = Path(options.output)
    path = output.with_stem(f"{output.stem}.preview") if options.preview is None else Path(options.preview)
    every = 1 if options.preview_every is None else options.preview_every
    return every, _name_outputs(path, options.num_images)


def _name_outputs(output: Path, count: int) -> list[Path]:
    """picture.png for one picture, picture-1.png, picture-2.png, ... for several."""
    if count <= 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{index}") for index in range(1, count + 1)]
