"""Pictures of many captions by every contestant, and what they are worth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from allaprima.benchmarks import fidelity
from allaprima.benchmarks.captions import Caption, CaptionsRun, paint_captions, places
from allaprima.benchmarks.contestants import Contestant
from allaprima.benchmarks.likeness import Picture, psnr, ssim
from allaprima.benchmarks.plan import Settings
from allaprima.benchmarks.quality import Figures, choose_reference, read_picture
from allaprima.bundle import RequestError

BAD = 35.0
"""In dB; what is below can be seen."""
Tell = Callable[[int, int, str], None]
"""How much is done, of how much, and what comes now."""


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
    gate: bool = False,
) -> Figures:
    """FID to the reference (statistics, or a folder of pictures) and CLIP score, and MLPerf's word on both.

    Each where its model is given, the last with `gate`. Raises RequestError.
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
    if not gate:
        return figures
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
