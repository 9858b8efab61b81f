"""Whether contestants paint the same picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from allaprima.benchmarks.contestants import Contestant
from allaprima.benchmarks.plan import Work


def psnr(picture: Path, reference: Path) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures in dB: 99 if equal, 0 if their sizes differ."""
    with Image.open(picture) as one, Image.open(reference) as other:
        a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if a.shape != b.shape:
        return 0.0
    error = float(np.square(a - b).mean())
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def picture_name(work: Work) -> str:
    """The file that keeps a picture of a configuration."""
    return f"{work.steps}-{work.batch}-{work.width}x{work.height}.png"


def compare_pictures(contestants: Sequence[Contestant], work: Work, folder: Path) -> dict[str, Any]:
    """The PSNR of every contestant's first picture of a configuration to the reference's.

    Pictures lie in `folder`/NAME. The reference is diffusers in fp32 if it is there, else the first in fp32;
    it has none itself. Empty where there is no reference, or no other contestant.
    """
    wanted = picture_name(work)
    names = [each.name for each in contestants if (folder / each.name / wanted).is_file()]
    wide = [each.name for each in contestants if each.precision == "fp32" and each.name in names]
    reference = next((name for name in wide if name.startswith("diffusers")), wide[0] if wide else None)
    if reference is None or len(names) < 2:
        return {}
    decibels = {
        name: psnr(folder / name / wanted, folder / reference / wanted) for name in names if name != reference
    }
    return {**asdict(work), "reference": reference, "psnr": decibels}
