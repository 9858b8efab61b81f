"""Many captions, one picture each: by every contestant in a process of its own."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from allaprima.benchmarks.contestants import Contestant
from allaprima.benchmarks.peer_files import stamp_of
from allaprima.benchmarks.plan import Settings, Work
from allaprima.benchmarks.report import library_versions
from allaprima.benchmarks.turns import Say, listen, opened, prepare, save_whole
from allaprima.bundle import RequestError, resolve
from allaprima.models.shapes.scenes import Scene


@dataclass(frozen=True)
class Caption:
    """A text, and the picture that is wanted of it; `scene` is what a picture of `shapes` should show."""

    text: str
    seed: int
    width: int
    height: int
    scene: Scene | None = None


def held_out_captions(count: int) -> list[Caption]:
    """Those of `shapes` that were not in its training, places as seeds. Raises RequestError for none."""
    from allaprima.models.shapes.evaluate import held_out

    if count < 1:
        raise RequestError(f"captions is {count}: give at least 1")
    scenes, texts = held_out(count)
    return [
        Caption(text, seed, scene.width, scene.height, scene)
        for seed, (text, scene) in enumerate(zip(texts, scenes, strict=True))
    ]


def read_captions(file: Path, width: int, height: int, seed: int) -> list[Caption]:
    """Of a text file, one a line, or of the column "caption" of a .tsv, as MLPerf lists those of COCO.

    The n-th has the n-th seed from the first on. Raises RequestError.
    """
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            if file.suffix == ".tsv":
                rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_MINIMAL)
                if "caption" not in (rows.fieldnames or ()):
                    raise RequestError(f"{file} has no column 'caption'")
                texts = [_caption(row, file, rows.line_num) for row in rows]
            else:
                texts = [line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{file} cannot be read: {error}") from error
    if not texts:
        raise RequestError(f"{file} has no captions: write one a line")
    return [Caption(text, seed + index, width, height) for index, text in enumerate(texts)]


def _caption(row: dict[str, str | None], file: Path, line: int) -> str:
    text = row["caption"]
    if text is None:
        raise RequestError(f"{file} has no caption in line {line}: it is shorter than the line of names")
    return text.strip()


@dataclass(frozen=True)
class CaptionsRun:
    """The job of painting all captions to `folder`/NUMBER.png."""

    contestant: Contestant
    settings: Settings
    captions: tuple[Caption, ...]
    steps: int
    folder: Path
    cache: Path | None

    def missing(self) -> list[tuple[int, Caption]]:
        """What is not there yet, those of one size together."""
        order = sorted(enumerate(self.captions), key=lambda pair: self._work(pair[1]).shape)
        return [pair for pair in order if not _place(self.folder, pair[0]).is_file()]

    def works(self) -> list[Work]:
        """What `missing` comes to, each once."""
        return list(dict.fromkeys(self._work(caption) for _, caption in self.missing()))

    def _work(self, caption: Caption) -> Work:
        return Work(1, caption.width, caption.height, self.steps)

    def __call__(self, say: Say) -> None:
        """Paint what is missing, and say each number."""
        with opened(self.contestant, self.settings, self.works(), self.cache) as (painter, _):
            for index, caption in self.missing():
                painter.settings = replace(self.settings, prompt=caption.text, seed=caption.seed)
                image = painter.paint(self._work(caption)).images[0]
                save_whole(image, _place(self.folder, index))
                say(("painted", index))


def paint_captions(job: CaptionsRun) -> Iterator[int]:
    """The number of each picture as it is painted.

    Raises RuntimeError with the reason if the contestant fails, RequestError if the folder cannot be written.
    """
    try:
        _forget_others(job)
    except OSError as error:
        raise RequestError(f"{job.folder} cannot be written: {error.strerror or error}") from error
    if not (works := job.works()):
        return
    prepare(job.contestant, job.settings, works, job.cache)
    with closing(listen(job)) as said:
        for _, index in said:
            yield index


def _forget_others(job: CaptionsRun) -> None:
    """Begin anew unless the pictures that are there were painted by this very job."""
    about = job.folder / "about.json"
    wanted = json.dumps(
        {
            **_weights(job.contestant),
            "versions": {**library_versions(), **job.contestant.versions},
            "steps": job.steps,
            "settings": asdict(job.settings),
            "captions": [asdict(each) for each in job.captions],
        }
    )
    if about.is_file() and about.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    about.write_text(wanted, encoding="utf-8")


def _weights(contestant: Contestant) -> dict[str, str | None]:
    """What tells a contestant's model from another: a bundle's manifest has the hashes of all its files."""
    bundle = checkpoint = None
    if contestant.bundle:
        manifest = resolve(contestant.bundle) / "bundle.json"
        bundle = hashlib.sha256(manifest.read_bytes()).hexdigest()
    if contestant.checkpoint is not None:
        checkpoint = stamp_of(contestant.checkpoint)
    return {"bundle": bundle, "checkpoint": checkpoint}


def places(folder: Path, captions: Sequence[Caption]) -> list[Path]:
    """Where the pictures of captions are."""
    return [_place(folder, index) for index in range(len(captions))]


def _place(folder: Path, index: int) -> Path:
    return folder / f"{index:05}.png"
