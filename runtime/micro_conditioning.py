"""The sizes that SDXL is told: of the picture that a training picture was cut from, and where it was cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from allaprima.bundle import Manifest, RequestError
from allaprima.runtime import fields

Pair = tuple[int, int]

TIME_IDS = "time_ids"
SIZES = ("original_size", "crops_coords_top_left", "target_size")
SCORES = {"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}
"""What they are if a request does not say, as in diffusers."""


@dataclass(frozen=True)
class MicroConditioning:
    """Sizes as (height, width) in pixels; None is the picture's own, a corner of None (0, 0).

    The negative ones are those of the guidance branch that is stayed away from; None is as the others.
    """

    original_size: Pair | None = None
    crops_coords_top_left: Pair | None = None
    target_size: Pair | None = None
    aesthetic_score: float | None = None
    negative_original_size: Pair | None = None
    negative_crops_coords_top_left: Pair | None = None
    negative_target_size: Pair | None = None
    negative_aesthetic_score: float | None = None

    def rows(self, count: int, height: int, width: int) -> tuple[list[float], list[float]]:
        """The numbers of the negative and of the other branch: six, or five with the aesthetic score."""
        size = height, width
        usual = {"original_size": size, "crops_coords_top_left": (0, 0), "target_size": size}
        found = []
        for prefix in ("negative_", ""):
            values = {
                name: _first(getattr(self, prefix + name), getattr(self, name), usual[name]) for name in SIZES
            }
            score = getattr(self, f"{prefix}aesthetic_score")
            last = (SCORES[f"{prefix}aesthetic_score"] if score is None else score,)
            pairs = [values["original_size"], values["crops_coords_top_left"]]
            tail = last if count == 5 else values["target_size"]
            found.append([float(number) for pair in (*pairs, tail) for number in pair])
        negative, positive = found
        return negative, positive


def _first(*values: Pair | None) -> Pair:
    return next(value for value in values if value is not None)


def read_micro_conditioning(given: Mapping[str, object], manifest: Manifest) -> MicroConditioning | None:
    """Check the fields of a request; None if the model is told no sizes.

    Raises RequestError for a field out of range, or one that the model does not take.
    """
    count = time_ids(manifest)
    known = {name: value for name, value in given.items() if value is not None}
    for name, value in known.items():
        scored = name in SCORES
        if count is None or ((scored or name.endswith("target_size")) and scored != (count == 5)):
            raise RequestError(f"{name} is {value!r}, but this model does not take it: leave it out")
    if count is None:
        return None
    checked = {
        name: fields.finite(name, value)
        if name in SCORES
        else fields.pair(name, value, 0 if name.endswith("top_left") else 1)
        for name, value in known.items()
    }
    return MicroConditioning(**checked)  # type: ignore[arg-type]


def time_ids(manifest: Manifest) -> int | None:
    """How many numbers the model is told: six, five with an aesthetic score, None for none."""
    inputs = manifest.components["denoiser"].inputs
    return next((int(spec.shape[-1]) for spec in inputs if spec.name == TIME_IDS), None)
