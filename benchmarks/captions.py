"""Many captions, one picture each: by every contestant in a process of its own."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from allaprima.benchmarks.contestants import Contestant
from allaprima.benchmarks.plan import Settings, Work
from allaprima.benchmarks.turns import Say, listen, opened
from allaprima.bundle import VERSION, RequestError
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
                texts = [row["caption"].strip() for row in rows]
            else:
                texts = [line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} cannot be read: {error}") from error
    if not texts:
        raise RequestError(f"{file} has no captions: write one a line")
    return [Caption(text, seed + index, width, height) for index, text in enumerate(texts)]


@dataclass(frozen=True)
class CaptionsRun:
    """The job of painting all captions to `folder`/NUMBER.png."""

    contestant: Contestant
    settings: Settings
    captions: tuple[Caption, ...]
    steps: int
    folder: Path
    cache: Path | None

    def __call__(self, say: Say) -> None:
        """Paint what is not there yet, those of one size together, and say each number."""
        works = {each: Work(1, each.width, each.height, self.steps) for each in self.captions}
        order = sorted(enumerate(self.captions), key=lambda pair: works[pair[1]].shape)
        missing = [pair for pair in order if not _place(self.folder, pair[0]).is_file()]
        if not missing:
            return
        planned = list(dict.fromkeys(works[caption] for _, caption in missing))
        with opened(self.contestant, self.settings, planned, self.cache) as (painter, _):
            for index, caption in missing:
                painter.settings = replace(self.settings, prompt=caption.text, seed=caption.seed)
                image = painter.paint(works[caption]).images[0]
                partial = self.folder / "unfinished"
                image.save(partial, format="PNG")
                partial.replace(_place(self.folder, index))
                say(("painted", index))


def paint_captions(job: CaptionsRun) -> Iterator[int]:
    """The number of each picture as it is painted.

    Raises RuntimeError with the reason if the contestant fails.
    """
    _forget_others(job)
    with closing(listen(job)) as said:
        for _, index in said:
            yield index


def _forget_others(job: CaptionsRun) -> None:
    """Begin anew unless the pictures that are there were painted by this very job."""
    about = job.folder / "about.json"
    wanted = json.dumps([VERSION, job.steps, asdict(job.settings), [asdict(each) for each in job.captions]])
    if about.is_file() and about.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    about.write_text(wanted, encoding="utf-8")


def places(folder: Path, captions: Sequence[Caption]) -> list[Path]:
    """Where the pictures of captions are."""
    return [_place(folder, index) for index in range(len(captions))]


def _place(folder: Path, index: int) -> Path:
    return folder / f"{index:05}.png"
