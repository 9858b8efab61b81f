"""What half precision costs `shapes`: pictures against those in fp32, and how many are still right.

```
python -m allaprima.benchmarks.half
```
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allaprima.benchmarks.bundles import Model, export_bundles
from allaprima.benchmarks.checkpoints import SHAPES
from allaprima.benchmarks.likeness import psnr, spread
from allaprima.benchmarks.report import RESULTS, stamp, table, write_result
from allaprima.bundle import AllaprimaError
from allaprima.cli.machine import read_machine
from allaprima.models.shapes.checker import Picture, Score, score
from allaprima.models.shapes.evaluate import held_out
from allaprima.models.shapes.scenes import Scene
from allaprima.runtime import Pipeline, backends


@dataclass(frozen=True)
class Way:
    """A backend, the precision it computes in, and that of the bundle's weights."""

    backend: str
    precision: str
    weights: str

    @property
    def name(self) -> str:
        """What the result calls it."""
        return f"{self.backend}-{self.precision}"


WAYS = (Way("ort", "fp32", "fp32"), Way("ort", "fp16", "fp16"), Way("openvino", "bf16", "fp16"))
"""The first is what the others are measured against."""


def paint(
    way: Way, model: Model, scenes: Sequence[Scene], texts: Sequence[str]
) -> tuple[Score, list[Picture]]:
    """One picture for each caption, with its place as seed, and how many are right."""
    pictures: list[Picture] = []
    with Pipeline.open(model.bundle(way.weights), backend=way.backend, precision=way.precision) as pipeline:

        def keep(index: int, scene: Scene) -> Picture:
            result = pipeline.generate(
                texts[index],
                num_inference_steps=20,
                guidance_scale=2.0,
                seed=index,
                height=scene.height,
                width=scene.width,
            )
            pictures.append(np.asarray(result.images[0]))
            return pictures[-1]

        return score(scenes, keep), pictures


def describe(found: Score, likeness: Sequence[float]) -> dict[str, Any]:
    """The figures of one way; no likeness is that of the first."""
    figures: dict[str, Any] = {"things": found.things, "relation": found.relation}
    if likeness:
        figures["psnr"] = spread(likeness)
    return figures


def tabulate(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of all ways."""
    head = [
        "",
        "shapes and colours right",
        "relations right",
        "PSNR to fp32: median",
        "smallest",
        "below 35 dB",
    ]
    rows = []
    for name, figures in results.items():
        found = figures.get("psnr")
        told = [f"{found[key]:.1f} dB" for key in ("median", "smallest")] if found else ["–", "–"]
        below = f"{found['below 35']}" if found else "–"
        rows.append([name, f"{figures['things']:.1%}", f"{figures['relation']:.1%}", *told, below])
    return table(head, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300, help="how many held-out captions (300)")
    parser.add_argument("--bundles", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count is {options.count}: give at least 1")
    command = shlex.join(["python", "-m", "allaprima.benchmarks.half", *arguments])
    try:
        print(_measure(options, command))
    except AllaprimaError as error:
        parser.error(str(error))


def _measure(options: argparse.Namespace, command: str) -> str:
    model = Model(SHAPES, options.bundles)
    able = {(info.name, precision) for info in backends() for precision in info.precisions}
    ways = [way for way in WAYS if (way.backend, way.precision) in able]
    export_bundles(model, list(dict.fromkeys(way.weights for way in ways)), _tell)
    scenes, texts = held_out(options.count)
    results: dict[str, dict[str, Any]] = {}
    plain: list[Picture] = []
    for way in ways:
        _tell(f"painting with {way.name}")
        found, pictures = paint(way, model, scenes, texts)
        results[way.name] = describe(
            found, [psnr(*pair) for pair in zip(pictures, plain, strict=True)] if plain else []
        )
        plain = plain or pictures
    about = {**stamp(command, model.name, read_machine().cores), "captions": options.count}
    introduction = f"{model.name}, {options.count} held-out captions, one seed each, 20 steps, guidance 2."
    result = {**about, "ways": [asdict(way) for way in ways], "results": results}
    return write_result(options.results, f"half-{model.name}", result, [introduction, "", *tabulate(results)])


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
