"""`allaprima bench quality`: how good the pictures are that somebody paints fast."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allaprima.bundle import BackendError, RequestError
from allaprima.cli.output import print_json, print_table, print_warnings, progress_bar

if TYPE_CHECKING:
    from allaprima.benchmarks.captions import Caption
    from allaprima.benchmarks.lineup import Lineup

QUALITY = "quality"
"""The word that asks for it."""
FILE = "quality.json"
CAPTIONS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `allaprima bench quality`."""
    group = parser.add_argument_group(
        "of quality",
        "Every contestant paints many captions; `shapes` is judged by its checker, all by their likeness to "
        "the first in fp32, and by FID and CLIP score where the models for them are given.",
    )
    add = group.add_argument
    add(
        "--captions",
        metavar="N",
        type=int,
        help=f"held-out ones of shapes ({CAPTIONS}); without the word too",
    )
    add("--texts", metavar="FILE", type=Path, help="captions instead: one a line, or MLPerf's .tsv")
    add("--pictures", metavar="DIR", type=Path, help="score these pictures of --texts, paint none")
    add("--inception", metavar="FILE", type=Path, help="for FID: an ONNX or TorchScript model of features")
    add("--reference", metavar="PATH", type=Path, help="for FID: an .npz with mu and sigma, or pictures")
    add("--mlperf", action="store_true", help="judge by MLPerf's gate of SDXL, which SDXL is by itself")
    add("--clip", metavar="DIR", type=Path, help="for CLIP score: a CLIP of transformers")


def run(options: argparse.Namespace, find: Callable[[], Lineup]) -> int | None:
    """Paint and score; exit code 1 if MLPerf's gate is for these pictures and they fail it."""
    from allaprima.benchmarks import scores as found_scores

    if options.pictures is not None:
        scores = {options.pictures.name: _score_folder(options)}
        absent: dict[str, str] = {}
    else:
        lineup = find()
        if not options.quiet:
            print_warnings(lineup.notes)
        scores, absent = _paint_and_score(options, lineup)
    if options.json:
        print_json({"scores": scores, "absent": absent})
    elif not options.quiet:
        print_table(found_scores.HEAD, found_scores.rows(scores))
    if not options.quiet:
        print_warnings(f"{name} was not scored: {why}" for name, why in absent.items())
        print_warnings(f"{name}: {note}" for name, note in _gate_notes(scores))
    if not scores:
        raise BackendError(
            "nothing could be scored: " + "; ".join(f"{n}: {why}" for n, why in absent.items())
        )
    failed = any(each.get("mlperf_sdxl", {}).get("passed") is False for each in scores.values())
    return 1 if failed else None


def _gate_notes(scores: dict[str, Any]) -> list[tuple[str, str]]:
    gates = {name: each["mlperf_sdxl"] for name, each in scores.items() if "mlperf_sdxl" in each}
    words = {True: "passes MLPerf's gate", False: "fails MLPerf's gate: ", None: "not judged: "}
    return [(name, words[gate["passed"]] + gate["reason"]) for name, gate in gates.items()]


def _score_folder(options: argparse.Namespace) -> dict[str, Any]:
    from allaprima.benchmarks.captions import read_captions
    from allaprima.benchmarks.scores import list_pictures, score_fidelity

    pictures = list_pictures(options.pictures)
    if options.inception is None and options.clip is None:
        raise RequestError(
            "--pictures needs --inception and --reference, or --clip and --texts, to score them"
        )
    if options.clip is not None and options.texts is None:
        raise RequestError("a CLIP score needs the pictures' captions: give --texts FILE")
    texts = [each.text for each in read_captions(options.texts, 0, 0, 0)] if options.texts else []
    if texts and len(texts) < len(pictures):
        raise RequestError(f"{len(pictures)} pictures have only {len(texts)} captions in {options.texts}")
    return score_fidelity(
        pictures,
        texts[: len(pictures)],
        inception=options.inception,
        reference=options.reference,
        clip=options.clip,
        gate=options.mlperf,
    )


def _paint_and_score(
    options: argparse.Namespace, lineup: Lineup
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    from allaprima.benchmarks.captions import places
    from allaprima.benchmarks.ours import own_cache
    from allaprima.benchmarks.scores import paint_all, score_captions, score_fidelity

    wanted = captions(options, lineup)
    steps = max(work.steps for work in lineup.plan.works)
    root = options.output or Path(f"bench-{lineup.name}") / QUALITY
    pictures = root / "pictures"
    with (
        tempfile.TemporaryDirectory(prefix="allaprima-quality-") as caches,
        progress_bar(quiet=options.quiet) as report,
    ):
        absent = lineup.absent | paint_all(
            lineup.contestants,
            lineup.plan.settings,
            wanted,
            steps,
            pictures,
            lambda each: own_cache(each, Path(caches)),
            lambda done, total, name: report("captions", done, total, name),
        )
    scores = score_captions(lineup.contestants, wanted, pictures)
    for name, figures in scores.items():
        if options.mlperf or lineup.sdxl or options.inception is not None or options.clip is not None:
            figures |= score_fidelity(
                places(pictures / name, wanted),
                [caption.text for caption in wanted],
                inception=options.inception,
                reference=options.reference,
                clip=options.clip,
                gate=options.mlperf or lineup.sdxl,
            )
    if scores:
        found = {"captions": len(wanted), "steps": steps, "scores": scores, "absent": absent}
        _write(root / FILE, {**found, "notes": list(lineup.notes)})
    return scores, absent


def captions(options: argparse.Namespace, lineup: Lineup) -> Sequence[Caption]:
    """What is painted: those of a file, or held-out ones of `shapes`. Raises RequestError."""
    from allaprima.benchmarks.captions import held_out_captions, read_captions

    work = lineup.plan.works[0]
    if options.texts is not None:
        return read_captions(options.texts, work.width, work.height, options.seed)
    if lineup.name != "shapes":
        raise RequestError(f"{lineup.name} has no captions of its own: give --texts FILE")
    return held_out_captions(CAPTIONS if options.captions is None else options.captions)


def _write(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from error
