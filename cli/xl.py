"""The options of SDXL of `allaprima generate`: second prompts, sizes, scores, and a refiner."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from allaprima.bundle import RequestError
from allaprima.cli.output import parse_size

if TYPE_CHECKING:
    from allaprima.runtime import MemoryUse, Result

_SIZES = {
    "original_size": ("--original-size", "of the picture that a training picture was cut from"),
    "target_size": ("--target-size", "that it was cut to"),
}
_SCORES = {
    "aesthetic_score": ("--aesthetic-score", "a refiner's, 1 to 10 (6)"),
    "negative_aesthetic_score": ("--negative-aesthetic-score", "that it stays away from (2.5)"),
}
_BASE_ALONE = ("image", "strength", "mask", "variation_seed", "variation_strength")
"""What the refiner is not asked for: the latents that it is given hold it."""


def add_xl(parser: argparse.ArgumentParser) -> None:
    """Add the options; a model that does not take one says so."""
    group = parser.add_argument_group("of SDXL")
    group.add_argument("--prompt-2", metavar="TEXT", help="for the second text encoder (the same)")
    group.add_argument("--negative-prompt-2", metavar="TEXT", help="likewise")
    for name, (flag, text) in _SIZES.items():
        for prefix in ("", "negative_"):
            dashed = flag if not prefix else f"--negative-{flag[2:]}"
            words = text if not prefix else "of the negative branch (the same)"
            group.add_argument(dashed, dest=prefix + name, metavar="WxH", type=_size, help=words)
    for prefix in ("", "negative_"):
        group.add_argument(
            f"--{prefix.replace('_', '-')}crop",
            dest=f"{prefix}crops_coords_top_left",
            metavar="X,Y",
            type=_corner,
            help="the corner where it was cut (0,0)" if not prefix else "of the negative branch (the same)",
        )
    for name, (flag, text) in _SCORES.items():
        group.add_argument(flag, dest=name, metavar="X", type=float, help=text)
    group.add_argument("--refiner", metavar="BUNDLE", help="the model that paints the end")
    group.add_argument(
        "--refiner-start", metavar="X", type=float, help="after which share of the noise schedule (0.8)"
    )


def read_xl(options: argparse.Namespace) -> dict[str, Any]:
    """What was given, as fields of a request to the base model, or the only one."""
    if options.refiner is None and options.refiner_start is not None:
        raise RequestError(f"--refiner-start is {options.refiner_start}, but there is no --refiner: name one")
    names = ["prompt_2", "negative_prompt_2"]
    for prefix in ("", "negative_"):
        names += [f"{prefix}{name}" for name in (*_SIZES, "crops_coords_top_left")]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.refiner is None:
        scores = {name: getattr(options, name) for name in _SCORES}
        return given | {name: score for name, score in scores.items() if score is not None}
    return {**given, "denoising_end": _start(options), "output_type": "latent"}


def for_refiner(options: argparse.Namespace, asked: Mapping[str, Any], begun: Result) -> dict[str, Any]:
    """The request to the refiner, for what the base model began: the same, without what that has done."""
    left_out = {*_BASE_ALONE, "denoising_end", "output_type", "height", "width"}
    left_out |= {f"{prefix}target_size" for prefix in ("", "negative_")}
    request = {name: value for name, value in asked.items() if name not in left_out}
    # Its one text encoder is the base's second.
    for name in ("prompt", "negative_prompt"):
        request[name] = request.pop(f"{name}_2", request[name])
    told = begun.parameters[0]
    scores = {name: getattr(options, name) for name in _SCORES if getattr(options, name) is not None}
    return {
        **request,
        **scores,
        "sampler": told.sampler,
        "seed": told.seed,
        "num_inference_steps": told.num_inference_steps,
        "guidance_scale": told.guidance_scale,
        "image": begun.latents,
        "denoising_start": _start(options),
    }


def joined(begun: Result, done: Result) -> Result:
    """The refiner's pictures, with how the base was asked for them."""
    parameters = tuple(
        replace(told, refiner=final.bundle)
        for told, final in zip(begun.parameters, done.parameters, strict=True)
    )
    timings = {stage: begun.timings[stage] + seconds for stage, seconds in done.timings.items()}
    warnings = tuple(dict.fromkeys(begun.warnings + done.warnings))
    memory = _both(begun.memory, done.memory)
    return replace(done, parameters=parameters, timings=timings, warnings=warnings, memory=memory)


def _both(base: MemoryUse | None, refiner: MemoryUse | None) -> MemoryUse | None:
    """What both did for a memory limit, one after the other."""
    if base is None or refiner is None:
        return None

    def named(roles: Iterable[str]) -> tuple[str, ...]:
        return tuple(f"the refiner's {role}" for role in roles)

    sizes = zip(named(refiner.components), refiner.components.values(), strict=True)
    return replace(
        base,
        peak=max(base.peak, refiner.peak),
        components={**base.components, **dict(sizes)},
        loaded=base.loaded + named(refiner.loaded),
        unloaded=base.unloaded + named(refiner.unloaded),
        seconds=base.seconds + refiner.seconds,
    )


def _start(options: argparse.Namespace) -> float:
    return 0.8 if options.refiner_start is None else options.refiner_start


def _size(text: str) -> tuple[int, int]:
    width, height = parse_size(text)
    return height, width


def _corner(text: str) -> tuple[int, int]:
    left, separator, top = text.partition(",")
    if not (separator and left.strip().isdecimal() and top.strip().isdecimal()):
        raise argparse.ArgumentTypeError(f"'{text}' is not a corner: write X,Y in pixels, as 0,128")
    return int(top), int(left)
