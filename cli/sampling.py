"""The sampler's own options of `allaprima generate`."""

from __future__ import annotations

import argparse
import json
from typing import Any

_NUMBERS = {
    "s_churn": ("--churn", "X", "Euler: noise to put in, over all steps"),
    "s_tmin": ("--churn-min", "SIGMA", "the least sigma at which it does"),
    "s_tmax": ("--churn-max", "SIGMA", "the greatest sigma at which it does"),
    "s_noise": ("--churn-noise", "X", "how strong that noise is, and DPM++ SDE's (1)"),
}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options; `allaprima samplers` says which sampler takes which."""
    group = parser.add_argument_group("of the sampler", "see: allaprima samplers")
    group.add_argument(
        "--timesteps", metavar="LIST", type=_parse_numbers, help="a schedule of your own, as 999,749,499,249"
    )
    group.add_argument(
        "--sigmas",
        metavar="LIST",
        type=_parse_numbers,
        help="likewise; for Euler to the end, as 14.6,1,0",
    )
    group.add_argument("--order", metavar="N", type=int, help="LMS: 1 to 4 (4)")
    for name, (flag, metavar, text) in _NUMBERS.items():
        group.add_argument(flag, dest=name, metavar=metavar, type=float, help=text)
    group.add_argument(
        "--scheduler-option",
        metavar="NAME=VALUE",
        type=_parse_option,
        action="append",
        default=[],
        help="in place of the model's, as timestep_spacing=trailing; may be repeated",
    )


def read_sampling(options: argparse.Namespace) -> dict[str, Any]:
    """What was given, as fields of Sampling."""
    names = ("timesteps", "sigmas", "order", *_NUMBERS)
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    chosen = dict(options.scheduler_option)
    return {**given, "scheduler": chosen} if chosen else given


def _parse_numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a list of numbers: separate them by commas, as 999,749,499,249"
        ) from None


def _parse_option(text: str) -> tuple[str, Any]:
    """A name and its value: true, false, null, numbers and lists as JSON has them, all else is text."""
    name, separator, value = text.partition("=")
    if not (separator and name):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not an option: write NAME=VALUE, as timestep_spacing=trailing"
        )
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
