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
from allaprima.benchmarks.plan import Work

Figures = dict[str, Any]


def picture_name(work: Work) -> str:
    """The file that keeps a picture of a configuration."""
    return f"{work.steps}-{work.batch}-{work.width}x{work.height}.png"


def read_picture(path: Path) -> Picture:
    """The RGB pixels of a file."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def choose_reference(contestants: Sequence[Contestant]) -> Contestant | None:
    """diffusers in fp32, else the first in fp32, of those that can be given the same noise."""
    wide = [each for each in contestants if each.precision == "fp32" and each.same_picture]
    plain = (each for each in wide if each.name.startswith("diffusers"))
    return next(plain, wide[0] if wide else None)


def compare_pictures(contestants: Sequence[Contestant], work: Work, folder: Path) -> Figures:
    """PSNR and SSIM of every contestant's first picture of a configuration to the reference's.

    Pictures lie in `folder`/NAME. The reference has none itself; who paints another picture by its nature is
    listed in "other". Empty where there is no reference, or no other contestant. "ssim" is empty without
    scikit-image, or for pictures that are too small for it.
    """
    wanted = picture_name(work)
    painted = [each for each in contestants if (folder / each.name / wanted).is_file()]
    reference = choose_reference(painted)
    if reference is None or len(painted) < 2:
        return {}
    picture = read_picture(folder / reference.name / wanted)
    pairs = {
        each.name: (made, picture)
        for each in painted
        if each is not reference and each.same_picture
        if (made := read_picture(folder / each.name / wanted)).shape == picture.shape
    }
    able = importlib.util.find_spec("skimage") is not None and min(picture.shape[:2]) >= SMALLEST
    return {
        **asdict(work),
        "reference": reference.name,
        "psnr": {name: psnr(*pair) for name, pair in pairs.items()},
        "ssim": {name: ssim(*pair) for name, pair in pairs.items() if able},
        "other": [each.name for each in painted if each is not reference and each.name not in pairs],
    }
