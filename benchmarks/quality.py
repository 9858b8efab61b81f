"""Whether contestants paint the same picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from allaprima.benchmarks.contestants import Contestant
from allaprima.benchmarks.likeness import SMALLEST, Picture, psnr, ssim
from allaprima.benchmarks.plan import Plan, Work, side_by_side
from allaprima.bundle import RequestError

Figures = dict[str, Any]


def picture_name(work: Work) -> str:
    """The file that keeps a picture of a configuration."""
    return f"{work.steps}-{work.batch}-{work.width}x{work.height}.png"


def read_picture(path: Path) -> Picture:
    """The RGB pixels of a file. Raises RequestError if it holds no picture."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path} cannot be read as a picture: {error}") from error


def choose_reference(contestants: Sequence[Contestant]) -> Contestant | None:
    """diffusers in fp32, else the first in fp32, of those that can be given the same noise."""
    wide = [each for each in contestants if each.precision == "fp32" and each.same_picture]
    plain = (each for each in wide if each.name.startswith("diffusers"))
    return next(plain, wide[0] if wide else None)


def compare_pictures(contestants: Sequence[Contestant], plan: Plan, folder: Path) -> Figures:
    """PSNR and SSIM of every contestant's first picture to the reference's, where both have painted it.

    Pictures lie in `folder`/NAME. "configurations" has all of the plan; beside it stand the figures of the
    one to show. The reference has none itself; who paints another picture by its nature is listed in "other".
    Empty where there is no reference, or no other contestant. "ssim" is empty without scikit-image, or for
    pictures that are too small for it.
    """
    painted = [each for each in contestants if any((folder / each.name).glob("*.png"))]
    reference = choose_reference(painted)
    if reference is None:
        return {}
    others = [each for each in painted if each is not reference]
    compared = {
        work: found for work in plan.works if (found := _compare(reference.name, others, work, folder))
    }
    if not compared:
        return {}
    shown = side_by_side(compared)
    return {
        **asdict(shown),
        "reference": reference.name,
        **compared[shown],
        "configurations": [{**asdict(work), **found} for work, found in compared.items()],
    }


def _compare(reference: str, others: Sequence[Contestant], work: Work, folder: Path) -> Figures:
    """The figures of one configuration; empty if it has no picture of the reference, or of any other."""
    wanted = picture_name(work)
    painted = [each for each in others if (folder / each.name / wanted).is_file()]
    if not painted or not (folder / reference / wanted).is_file():
        return {}
    picture = read_picture(folder / reference / wanted)
    pairs = {
        each.name: (made, picture)
        for each in painted
        if each.same_picture
        if (made := read_picture(folder / each.name / wanted)).shape == picture.shape
    }
    able = importlib.util.find_spec("skimage") is not None and min(picture.shape[:2]) >= SMALLEST
    return {
        "psnr": {name: psnr(*pair) for name, pair in pairs.items()},
        "ssim": {name: ssim(*pair) for name, pair in pairs.items() if able},
        "other": [each.name for each in painted if each.name not in pairs],
    }
