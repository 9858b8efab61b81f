"""The picture checker: which shapes in which colours the pixels show and where, compared with a scene.

It knows nothing of the model: the picture is split into background and connected components, each component's
colour is the nearest of the palette to its median, its shape the outline it overlaps best.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from allaprima.models.shapes.scenes import COLOURS, KINDS, PALETTE, Scene, Thing, draw_kind, holds

GRID = 64
"""Side of the square onto which outlines are stretched for comparison."""
FOREGROUND = 48.0
"""Distance from the background, in RGB units, from which a pixel belongs to a shape; no two colours of the
palette are nearer than 83."""
SMALLEST = 0.006
"""Smallest area of a shape over the square of the picture's shorter side."""
LIKENESS = 0.7
"""Overlap (intersection over union) below which a component is no known shape."""

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Seen:
    """One component: its shape ("unknown" where none fits), colour and centre in pixels."""

    kind: str
    colour: str
    x: float
    y: float


@dataclass(frozen=True)
class Verdict:
    """How a picture compares with its scene. `relation` is None where the caption names none."""

    things: bool
    relation: bool | None
    seen: tuple[Seen, ...]
    background: str


def look(picture: Picture) -> tuple[str, tuple[Seen, ...]]:
    """Background colour and shapes of a uint8 [height, width, 3] picture, largest shape first."""
    pixels = picture.astype(np.float32)
    border = np.concatenate(
        [pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]]
    )
    names = _nearest(border)
    ground = int(np.bincount(names, minlength=len(COLOURS)).argmax())
    centre = np.median(border[names == ground], axis=0)
    mask = np.linalg.norm(pixels - centre, axis=-1) > FOREGROUND
    parts, count = ndimage.label(mask)
    smallest = SMALLEST * min(picture.shape[:2]) ** 2
    areas = ndimage.sum_labels(mask, parts, range(1, count + 1))
    order = [int(k) + 1 for k in np.argsort(areas)[::-1] if areas[k] >= smallest]
    return COLOURS[ground], tuple(_see(pixels, parts == part) for part in order)


def judge(scene: Scene, picture: Picture) -> Verdict:
    """Whether the picture shows exactly the scene's shapes, colours and background, and its relation."""
    background, seen = look(picture)
    wanted = Counter((thing.kind, thing.colour) for thing in scene.things)
    things = background == scene.background and wanted == Counter((one.kind, one.colour) for one in seen)
    relation = None
    if scene.relation is not None:
        relation = things and any(_related(scene, pair) for pair in permutations(seen))
    return Verdict(things, relation, seen, background)


@dataclass(frozen=True)
class Score:
    """Shares over many captions: shapes and colours right; of those with a relation, all of it right."""

    captions: int
    things: float
    relation: float
    failures: tuple[int, ...]


def score(scenes: Sequence[Scene], paint: Callable[[int, Scene], Picture]) -> Score:
    """Judge the picture that `paint(index, scene)` makes for every scene."""
    verdicts = [judge(scene, paint(index, scene)) for index, scene in enumerate(scenes)]
    related = [verdict.relation for verdict in verdicts if verdict.relation is not None]
    failures = [
        index for index, verdict in enumerate(verdicts) if not verdict.things or verdict.relation is False
    ]
    things = sum(verdict.things for verdict in verdicts) / len(verdicts)
    return Score(len(verdicts), things, sum(related) / max(1, len(related)), tuple(failures))


def _nearest(pixels: NDArray[np.float32]) -> NDArray[np.intp]:
    palette = np.array(list(PALETTE.values()), dtype=np.float32)
    nearest: NDArray[np.intp] = np.linalg.norm(pixels[:, None] - palette, axis=-1).argmin(1)
    return nearest


def _see(pixels: NDArray[np.float32], mask: Mask) -> Seen:
    inner = ndimage.binary_erosion(mask, iterations=2)
    colour = np.median(pixels[inner if inner.any() else mask], axis=0)
    rows, columns = np.nonzero(mask)
    box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    stretched = np.asarray(Image.fromarray(box).resize((GRID, GRID), Image.Resampling.NEAREST))
    likeness = {kind: _overlap(stretched, _template(kind)) for kind in KINDS}
    kind = max(likeness, key=lambda name: likeness[name])
    middle = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
    name = COLOURS[int(_nearest(colour[None])[0])]
    return Seen(kind if likeness[kind] >= LIKENESS else "unknown", name, float(middle[0]), float(middle[1]))


def _overlap(a: Mask, b: Mask) -> float:
    return float((a & b).sum() / (a | b).sum())


@lru_cache(maxsize=len(KINDS))
def _template(kind: str) -> Mask:
    canvas = Image.new("L", (16 * GRID, 16 * GRID))
    draw_kind(ImageDraw.Draw(canvas), kind, 8 * GRID, 8 * GRID, 6 * GRID, 255, 0)
    stretched = canvas.crop(canvas.getbbox()).resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(stretched) > 127


def _related(scene: Scene, pair: Sequence[Seen]) -> bool:
    named = [(thing.kind, thing.colour) for thing in scene.things]
    if scene.relation is None or [(one.kind, one.colour) for one in pair] != named:
        return False
    first, second = (Thing(one.kind, one.colour, "", one.x, one.y, 0.0) for one in pair)
    return holds(scene.relation, first, second)
