"""Checks of single fields of a request: each returns the value, or raises RequestError that names it."""

from __future__ import annotations

import secrets
from contextlib import suppress
from numbers import Integral, Real

from allaprima.bundle import Latent, RequestError


def text(name: str, value: object) -> str:
    """A string; RequestError if it is none."""
    if not isinstance(value, str):
        raise RequestError(f"{name} is {value!r}: it should be a text")
    return value


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}: it should be True or False")
    return value


def whole(name: str, value: object, least: int) -> int:
    """A whole number of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}: it should be a whole number")
    if value < least:
        raise RequestError(f"{name} is {value}: it should be at least {least}")
    return int(value)


def finite(name: str, value: object) -> float:
    """A number that is finite in float32."""
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            number = float(value)
            if abs(number) < 3e38:  # the graph computes in float32: beyond its range is infinite to it
                return number
    raise RequestError(f"{name} is {value!r}: it should be a finite number")


def share(name: str, value: object) -> float:
    """A number from 0 to 1."""
    share = finite(name, value)
    if not 0 <= share <= 1:
        raise RequestError(f"{name} is {share}: it should lie between 0 (off) and 1")
    return share


def part(name: str, value: object) -> float | None:
    """A share of the noise schedule, neither nothing nor all of it; None is none."""
    if value is None:
        return None
    part = finite(name, value)
    if not 0 < part < 1:
        raise RequestError(f"{name} is {part}: it should lie between 0 and 1; leave it out for the whole")
    return part


def eta(value: object) -> float:
    """DDIM's share of fresh noise."""
    eta = finite("eta", value)
    if not 0 <= eta <= 1:
        raise RequestError(f"eta is {eta}: it should lie between 0 (no noise, DDIM) and 1 (DDPM)")
    return eta


def seed(name: str, value: object, count: int) -> int:
    """A seed, the first of `count`; None is a random one of 32 bits."""
    seed = secrets.randbits(32) if value is None else whole(name, value, 0)
    if seed + count > 2**64:
        raise RequestError(f"{name} {seed} is too large for {count} images: seeds end at 2**64 - 1")
    return seed


def side(name: str, value: object, latent: Latent) -> int:
    """A side of a picture in pixels, a multiple of what the model paints."""
    side = whole(name, value, 1)
    multiple = latent.multiple
    below = side // multiple * multiple
    if below == side:
        return side
    nearest = f"{below} and {below + multiple}" if below else f"{multiple}"
    sizes = "sizes are" if below else "size is"
    raise RequestError(f"{name} {side} is not a multiple of {multiple}: the nearest valid {sizes} {nearest}")


def pair(name: str, value: object, least: int) -> tuple[int, int]:
    """Two whole numbers of at least `least`, as height and width."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise RequestError(f"{name} is {value!r}: it should be two whole numbers, height and width")
    first, second = (whole(name, each, least) for each in value)
    return first, second
