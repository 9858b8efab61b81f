"""Quality beside speed: whether contestants paint the same pictures, the right ones, and good ones."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from allaprima.benchmarks import fidelity
from allaprima.benchmarks.captions import Caption, CaptionsRun, paint_captions, places
from allaprima.benchmarks.contestants import Contestant
from allaprima.benchmarks.likeness import Picture, psnr, ssim
from allaprima.benchmarks.plan import Settings
from allaprima.bundle import RequestError

BAD = 35.0
"""In dB; what is below can be seen."""
Figures = dict[str, Any]
Tell = Callable[[int, int, str], None]
"""How much is done, of how much, and what comes now."""


def read_picture(path: Path) -> Picture:
    """The RGB pixels of a file."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def choose_reference(contestants: Sequence[Contestant]) -> Contestant | None:
    """diffusers in fp32, else the first in fp32, of those that can be given the same noise."""
    wide = [each for each in contestants if each.precision == "fp32" and each.same_picture]
    plain = (each for each in wide if each.name.startswith("diffusers"))
    return next(plain, wide[0] if wide else None)


def compare_pictures(contestants: Sequence[Contestant], folder: Path) -> Figures:
    """PSNR and SSIM of every contestant's picture to the reference's, that of the most steps.

    Pictures lie in `folder`/NAME. The reference has none itself; who paints another picture by its nature is
    listed in "other". Empty where there is no reference, or no other contestant.
    """
    painted = [each for each in contestants if any((folder / each.name).glob("*.png"))]
    reference = choose_reference(painted)
    if reference is None or len(painted) < 2:
        return {}
    paths = (folder / reference.name).glob("*.png")
    wanted = max(paths, key=lambda path: int(path.name.partition("-")[0]))
    picture = read_picture(wanted)
    rest = [each for each in painted if each.name != reference.name and each.same_picture]
    found = {each.name: folder / each.name / wanted.name for each in rest}
    pairs = {name: (read_picture(path), picture) for name, path in found.items() if path.is_file()}
    return {
        "reference": reference.name,
        "picture": wanted.stem,
        "psnr": {name: psnr(*pair) for name, pair in pairs.items()},
        "ssim": {name: ssim(*pair) for name, pair in pairs.items()},
        "other": [each.name for each in painted if not each.same_picture],
    }


def paint_all(
    contestants: Sequence[Contestant],
    settings: Settings,
    captions: Sequence[Caption],
    steps: int,
    folder: Path,
    cache: Callable[[Contestant], Path | None],
    tell: Tell,
) -> dict[str, str]:
    """Every caption's picture by every contestant, to `folder`/NAME; who failed, with the reason.

    What is already there is not painted again, so a run that was cut short can go on.
    """
    absent: dict[str, str] = {}
    total = len(contestants) * len(captions)
    for place, each in enumerate(contestants):
        done = place * len(captions)
        tell(done, total, each.name)
        job = CaptionsRun(each, settings, tuple(captions), steps, folder / each.name, cache(each))
        try:
            for count, _ in enumerate(paint_captions(job), 1):
                tell(done + count, total, each.name)
        except RuntimeError as error:
            absent[each.name] = str(error)
    return absent


def score_captions(
    contestants: Sequence[Contestant], captions: Sequence[Caption], folder: Path
) -> dict[str, Figures]:
    """What the pictures of many captions say of each contestant that painted all of them.

    For `shapes` the shares of pictures with the right things and relations; likeness to the reference.
    """
    painted = [
        each for each in contestants if all(path.is_file() for path in places(folder / each.name, captions))
    ]
    reference = choose_reference(painted)
    scores: dict[str, Figures] = {}
    for each in painted:
        pictures = [read_picture(path) for path in places(folder / each.name, captions)]
        figures = check_scenes(captions, pictures)
        if reference is not None and each is not reference and each.same_picture:
            wanted = (read_picture(path) for path in places(folder / reference.name, captions))
            figures |= likeness(list(zip(pictures, wanted, strict=True)))
            figures["reference"] = reference.name
        scores[each.name] = figures
    return scores


def check_scenes(captions: Sequence[Caption], pictures: Sequence[Picture]) -> Figures:
    """By the checker of `shapes`, where all captions describe scenes of it."""
    from allaprima.models.shapes.checker import score

    scenes = [caption.scene for caption in captions if caption.scene is not None]
    if len(scenes) != len(captions):
        return {}
    found = score(scenes, lambda index, _: pictures[index])
    return {"things": found.things, "relations": found.relation}


def likeness(pairs: Sequence[tuple[Picture, Picture]]) -> Figures:
    """PSNR and SSIM of pairs: medians, the smallest, and how many can be told apart by eye."""
    decibels = [psnr(*pair) for pair in pairs]
    similarities = [ssim(*pair) for pair in pairs]
    return {
        "psnr": {
            "median": statistics.median(decibels),
            "smallest": min(decibels),
            f"below {BAD:g}": sum(each < BAD for each in decibels),
        },
        "ssim": {"median": statistics.median(similarities), "smallest": min(similarities)},
    }


def score_fidelity(
    pictures: Sequence[Path],
    texts: Sequence[str],
    *,
    inception: Path | None,
    reference: Path | None,
    clip: Path | None,
) -> Figures:
    """FID to the reference (statistics, or a folder of pictures), CLIP score, and what MLPerf's gate says.

    Each where its model is given. Raises RequestError.
    """
    from allaprima.benchmarks.features import clip_embeddings, inception_features

    if (inception is None) != (reference is None):
        raise RequestError("FID needs both a model for features and a reference: give both or none")
    figures: Figures = {"pictures": len(pictures), "fid": None, "clip": None}
    if inception is not None and reference is not None:
        ours = fidelity.statistics_of(inception_features(inception, map(read_picture, pictures)))
        figures["fid"] = fidelity.frechet_distance(ours, _reference_statistics(reference, inception))
    if clip is not None:
        figures["clip"] = fidelity.clip_score(*clip_embeddings(clip, pictures, texts, read_picture))
    passed, why = fidelity.judge(fidelity.MLPERF_SDXL, len(pictures), figures["fid"], figures["clip"])
    return {**figures, "mlperf_sdxl": {"passed": passed, "reason": why}}


def _reference_statistics(reference: Path, inception: Path) -> fidelity.Statistics:
    from allaprima.benchmarks.features import inception_features

    if not reference.is_dir():
        return fidelity.read_statistics(reference)
    return fidelity.statistics_of(inception_features(inception, map(read_picture, list_pictures(reference))))


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their names. Raises RequestError if there are none."""
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    found = (
        sorted(path for path in folder.glob("*") if path.suffix.lower() in kinds) if folder.is_dir() else []
    )
    if not found:
        raise RequestError(f"{folder} is no folder with pictures (PNG, JPEG or WebP)")
    return found


def rows(scores: Mapping[str, Figures]) -> list[tuple[str, ...]]:
    """A table of what `score_captions` and `score_fidelity` found; see `HEAD`."""
    return [
        (
            name,
            *(_shown(figures.get(key), "{:.1%}") for key in ("things", "relations")),
            *(_shown(figures.get("psnr", {}).get(key), "{:.1f} dB") for key in ("median", "smallest")),
            _shown(figures.get("ssim", {}).get("median"), "{:.4f}"),
            *(_shown(figures.get(key), "{:.4f}") for key in ("fid", "clip")),
        )
        for name, figures in scores.items()
    ]


HEAD = (
    "contestant",
    "things right",
    "relations right",
    "PSNR, median",
    "smallest",
    "SSIM",
    "FID",
    "CLIP score",
)


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
