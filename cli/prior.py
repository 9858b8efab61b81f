"""The options of Kandinsky of `allaprima generate`: what its prior takes, and a depth map."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

_FIELDS = {
    "prior_num_inference_steps": "prior_steps",
    "prior_guidance_scale": "prior_guidance",
    "prior_image": "prior_image",
    "prior_strength": "prior_strength",
    "prior_negative_prompt": "prior_negative_prompt",
    "mix": "mix",
    "hint": "hint",
}
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def add_prior(parser: argparse.ArgumentParser) -> None:
    """Add the options; a model that does not take one says so."""
    group = parser.add_argument_group("of Kandinsky")
    group.add_argument("--prior-steps", metavar="N", type=int, help="steps of the prior, 2 or more (25)")
    group.add_argument(
        "--prior-guidance", metavar="SCALE", type=float, help="how strictly it follows the prompt (4)"
    )
    group.add_argument("--prior-image", metavar="FILE", help="a picture that the prior begins with")
    group.add_argument(
        "--prior-strength", metavar="X", type=float, help="how much it makes of it anew, 0 to 1 (0.3)"
    )
    group.add_argument(
        "--mix",
        metavar="WHAT=WEIGHT",
        type=_parse_item,
        action="append",
        help="in place of PROMPT: a text or a picture's file, as 'a cat=0.3' or a.png=0.7; may be repeated",
    )
    group.add_argument(
        "--prior-negative-prompt", metavar="TEXT", help="with --mix: what the prior stays away from"
    )
    group.add_argument(
        "--hint", metavar="FILE", help="of a depth model: the picture of depths, bright where it is near"
    )


def read_prior(options: argparse.Namespace) -> dict[str, Any]:
    """What was given, as fields of a request."""
    given = {name: getattr(options, option) for name, option in _FIELDS.items()}
    return {name: value for name, value in given.items() if value is not None}


def _parse_item(text: str) -> tuple[str | Path, float]:
    """A text or a picture, and its weight."""
    what, separator, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        separator = ""
    if not separator:
        raise argparse.ArgumentTypeError(
            f"'{text}' has no weight: write a text or a picture's file, and a number, as 'a cat=0.3'"
        )
    if os.path.isfile(what):  # unlike Path's, it takes any text
        return Path(what), weight
    if what.lower().endswith(_PICTURES):
        raise argparse.ArgumentTypeError(f"'{what}' is no file: name a picture, or write a text")
    return what, weight
