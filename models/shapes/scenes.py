"""Scenes of one or two coloured shapes: drawn at random, rendered, split into training and held out."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 38),
    "orange": (244, 140, 26),
    "yellow": (250, 220, 50),
    "green": (38, 150, 70),
    "blue": (38, 84, 214),
    "purple": (128, 48, 176),
    "pink": (246, 150, 196),
    "brown": (122, 74, 36),
    "cyan": (64, 208, 214),
    "black": (22, 22, 24),
    "white": (250, 250, 250),
    "gray": (136, 138, 142),
}
COLOURS = tuple(PALETTE)
KINDS = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
SIZES = ("small", "medium", "large")
RELATIONS = ("above", "below", "left of", "right of")
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
PLACES = tuple(
    " ".join(word for word in (row, column) if word) or "center"
    for row in ("top", "", "bottom")
    for column in ("left", "", "right")
)
CANVASES = ((128, 128), (192, 128), (128, 192))
"""Trained picture sizes, (width, height) in pixels."""

# Radius of the enclosing circle over the shorter side of the picture.
ALONE = {"small": (0.17, 0.19), "medium": (0.25, 0.28), "large": (0.34, 0.37)}
PAIRED = {"small": (0.14, 0.15), "medium": (0.175, 0.19), "large": (0.215, 0.225)}
MARGIN = 3.0
"""Pixels between a shape and the edge of the picture."""
SUPERSAMPLING = 4
HELD_OUT_SHARE = 16


@dataclass(frozen=True)
class Thing:
    """One shape: what, in which colour, how large, and where (centre and radius in pixels)."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    `relation` says where the first thing lies, seen from the second (None: not said);
    `place` is the named ninth of the picture in which a single thing lies (None: not said).
    """

    width: int
    height: int
    background: str
    things: tuple[Thing, ...]
    relation: str | None = None
    place: str | None = None

    @property
    def held_out(self) -> bool:
        """True for one in sixteen combinations of things and background, which training never sees."""
        named = sorted(f"{thing.colour} {thing.kind}" for thing in self.things)
        return zlib.crc32(";".join([*named, self.background]).encode()) % HELD_OUT_SHARE == 0


def draw_scene(random: np.random.Generator, width: int = 128, height: int = 128) -> Scene:
    """A random scene for a canvas of `width` × `height` pixels."""
    background = "white" if random.random() < 0.4 else str(random.choice(COLOURS))
    if random.random() < 0.35:
        place = str(random.choice(PLACES)) if random.random() < 0.5 else None
        thing = _place_alone(
            random, _draw_thing(random, background, ALONE, min(width, height)), width, height, place
        )
        return Scene(width, height, background, (thing,), place=place)
    relation = str(random.choice(RELATIONS)) if random.random() < 0.8 else None
    while True:
        first, second = (_draw_thing(random, background, PAIRED, min(width, height)) for _ in range(2))
        first, second = _place_pair(random, first, second, width, height, relation or "left of")
        if _apart(first, second) and holds(relation or "left of", first, second, 1.5):
            return Scene(width, height, background, (first, second), relation=relation)


def draw_split(random: np.random.Generator, held_out: bool, width: int = 128, height: int = 128) -> Scene:
    """A random scene of the training part or of the held-out part."""
    while True:
        scene = draw_scene(random, width, height)
        if scene.held_out == held_out:
            return scene


def holds(relation: str, first: Thing, second: Thing, dominance: float = 1.0) -> bool:
    """Whether `first` lies `relation` (of) `second`, its axis at least `dominance` times the other one."""
    dx, dy = first.x - second.x, first.y - second.y
    along, across = (dy, dx) if relation in ("above", "below") else (dx, dy)
    sign = -1.0 if relation in ("above", "left of") else 1.0
    return sign * along >= dominance * abs(across) and sign * along > 0


def _draw_thing(
    random: np.random.Generator, background: str, radii: dict[str, tuple[float, float]], side: int
) -> Thing:
    colour = str(random.choice([name for name in COLOURS if name != background]))
    size = str(random.choice(SIZES, p=(0.2, 0.6, 0.2)))
    return Thing(
        str(random.choice(KINDS)), colour, size, 0.0, 0.0, float(random.uniform(*radii[size])) * side
    )


def _place_alone(
    random: np.random.Generator, thing: Thing, width: int, height: int, place: str | None
) -> Thing:
    """Put the thing near the middle, or near the middle of the named side or corner."""
    words = place.split() if place else []
    x = _coordinate(random, width, thing.radius, ("left", "right"), words)
    y = _coordinate(random, height, thing.radius, ("top", "bottom"), words)
    return replace(thing, x=x, y=y)


def _coordinate(
    random: np.random.Generator, side: int, radius: float, ends: tuple[str, str], words: list[str]
) -> float:
    low, high, band = radius + MARGIN, side - radius - MARGIN, 0.05 * side
    if ends[0] in words:
        return float(random.uniform(low, min(low + band, high)))
    if ends[1] in words:
        return float(random.uniform(max(high - band, low), high))
    return float(random.uniform(max(side / 2 - band, low), min(side / 2 + band, high)))


def _place_pair(
    random: np.random.Generator, first: Thing, second: Thing, width: int, height: int, relation: str
) -> tuple[Thing, Thing]:
    """Put both things on one axis, each a quarter from its end, with a little play."""
    beside = relation in ("left of", "right of")
    length, across = (width, height) if beside else (height, width)
    before = relation in ("left of", "above")
    placed = []
    for thing, quarter in ((first, 0.26 if before else 0.74), (second, 0.74 if before else 0.26)):
        low, high = thing.radius + MARGIN, length - thing.radius - MARGIN
        a = min(max(quarter * length + random.uniform(-0.02, 0.02) * length, low), high)
        b = across / 2 + random.uniform(-0.05, 0.05) * across
        placed.append(replace(thing, x=float(a if beside else b), y=float(b if beside else a)))
    return placed[0], placed[1]


def _apart(first: Thing, second: Thing) -> bool:
    return math.hypot(first.x - second.x, first.y - second.y) >= first.radius + second.radius + 4.0


def outline(kind: str) -> list[tuple[float, float]]:
    """Corners of a polygonal kind on the unit circle's scale, y pointing down."""
    if kind == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if kind == "diamond":
        return [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)]
    if kind == "triangle":
        return [(0.0, -0.92), (0.95, 0.78), (-0.95, 0.78)]
    if kind == "star":
        turns = [(math.pi * k / 5 - math.pi / 2, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
        return [(radius * math.cos(angle), radius * math.sin(angle) + 0.05) for angle, radius in turns]
    if kind == "cross":
        a, b = 0.32, 0.95
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    if kind == "heart":
        angles = [2 * math.pi * k / 64 for k in range(64)]
        return [
            (
                16 * math.sin(t) ** 3 / 17,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17 - 0.1,
            )
            for t in angles
        ]
    raise ValueError(f"no outline for {kind!r}")


def draw_kind(
    draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float, colour: object, hole: object
) -> None:
    """Draw one shape, lengths in pixels of the canvas; `hole` is the colour that is seen through a ring."""
    if kind in ("circle", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)  # type: ignore[arg-type]
        if kind == "ring":
            inner = 0.55 * radius
            draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=hole)  # type: ignore[arg-type]
        return
    draw.polygon([(x + radius * u, y + radius * v) for u, v in outline(kind)], fill=colour)  # type: ignore[arg-type]


def render(scene: Scene) -> NDArray[np.uint8]:
    """The scene as an antialiased picture, uint8 [height, width, 3]."""
    k = SUPERSAMPLING
    background = PALETTE[scene.background]
    canvas = Image.new("RGB", (scene.width * k, scene.height * k), background)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        draw_kind(
            draw, thing.kind, thing.x * k, thing.y * k, thing.radius * k, PALETTE[thing.colour], background
        )
    return np.asarray(canvas.reduce(k), dtype=np.uint8)
