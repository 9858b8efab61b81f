"""What an int8 denoiser costs `shapes`, and what it saves: pictures and seconds beside those in float.

```
python -m allaprima.benchmarks.int8
```

Ranges are taken from captions of the training's kind; what is painted are held-out ones.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allaprima.benchmarks import step_cache
from allaprima.benchmarks.likeness import ssim
from allaprima.benchmarks.report import RESULTS, stamp, table, write_result
from allaprima.benchmarks.step_cache import Painted
from allaprima.bundle import AllaprimaError, Bundle, Quantization, open_bundle, resolve
from allaprima.cli.machine import read_machine
from allaprima.engine.calibration import Calibration
from allaprima.engine.quantize import quantize_bundle
from allaprima.models.shapes.captions import caption
from allaprima.models.shapes.evaluate import held_out
from allaprima.models.shapes.scenes import Scene, draw_split
from allaprima.runtime import Pipeline, backends

BLOCK = 10
"""So many captions are painted in one way before the next has its turn."""
GUIDANCE = 2.0


@dataclass(frozen=True)
class Way:
    """A backend, what it is asked to compute in, and of which bundle: the one in float is ""."""

    backend: str
    precision: str
    bundle: str = ""

    @property
    def name(self) -> str:
        """What the result calls it."""
        return f"{self.backend} {self.bundle}{'+' if self.bundle else ''}{self.precision}"


QUANTIZED: Mapping[str, float | None] = {"int8": None, "int8-close": 0.02}
"""The quantized bundles, each with the error that `quantize` is given as the most there may be."""


WAYS = (
    Way("openvino", "fp32"),
    Way("openvino", "bf16"),
    Way("openvino", "bf16", "int8"),
    Way("openvino", "bf16", "int8-close"),
    Way("ort", "fp16"),
    Way("ort", "fp16", "int8"),
)
"""The first is what the others are measured against. ONNX Runtime computes fp16 in float32 on a CPU."""


def training_captions(count: int) -> tuple[str, ...]:
    """Captions as `shapes` was trained with: none of them is among the held-out ones."""
    random = np.random.default_rng(8)
    return tuple(caption(draw_split(random, held_out=False), random) for _ in range(count))


def paint_all(
    pipelines: Mapping[str, Pipeline],
    scenes: Sequence[Scene],
    texts: Sequence[str],
    steps: int,
    tell: Callable[[str], None],
) -> dict[str, list[Painted]]:
    """One picture for each caption and pipeline, with the caption's place as seed, taking turns.

    Each turn begins with a picture that is not counted.
    """
    painted: dict[str, list[Painted]] = {name: [] for name in pipelines}
    for start in range(0, len(scenes), BLOCK):
        tell(f"captions {start + 1} to {min(start + BLOCK, len(scenes))} of {len(scenes)}")
        for name, pipeline in pipelines.items():
            _paint(pipeline, scenes[start], texts[start], start, min(2, steps))
            for index in range(start, min(start + BLOCK, len(scenes))):
                painted[name].append(_paint(pipeline, scenes[index], texts[index], index, steps))
    return painted


def _paint(pipeline: Pipeline, scene: Scene, text: str, seed: int, steps: int) -> Painted:
    result = pipeline.generate(
        text,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        seed=seed,
        height=scene.height,
        width=scene.width,
    )
    return np.asarray(result.images[0]), result.timings["total"]


def describe(scenes: Sequence[Scene], painted: Mapping[str, Sequence[Painted]]) -> dict[str, dict[str, Any]]:
    """The figures of each way; the first has no likeness to itself."""
    described = step_cache.describe(scenes, painted)
    (_, reference), *others = painted.items()
    for name, mine in others:
        pairs = zip(mine, reference, strict=True)
        described[name]["ssim"] = statistics.median(ssim(one, other) for (one, _), (other, _) in pairs)
    return described


def tabulate(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of all ways."""
    head = ["", "seconds a picture", "shapes and colours right", "relations right"]
    head += ["PSNR to the first: median", "smallest", "below 35 dB", "SSIM: median"]
    rows = []
    for name, figures in results.items():
        row = [
            name,
            f"{figures['seconds']:.3f}",
            f"{figures['things']:.1%}",
            f"{figures['relation']:.1%}",
        ]
        if (likeness := figures.get("psnr")) is not None:
            row += [f"{likeness[key]:.1f} dB" for key in ("median", "smallest")]
            row += [f"{likeness['below 35']}", f"{figures['ssim']:.4f}"]
        rows.append(row + ["–"] * (len(head) - len(row)))
    return table(head, rows)


def tabulate_quantized(quantized: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of the quantized bundles."""
    return table(
        ["", "asked for", "layers in int8", "predictions are off by"],
        [
            [
                name,
                "all layers" if (most := QUANTIZED[name]) is None else f"{most:.0%} or about it",
                f"{each['layers']} of {each['total']}",
                f"{each['error']:.1%} of their deviation",
            ]
            for name, each in quantized.items()
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300, help="how many held-out captions (300)")
    parser.add_argument("--samples", type=int, default=16, help="pictures to calibrate with (16)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (20)")
    parser.add_argument("--bundle", default="shapes", help="a bundle of shapes in float (shapes)")
    parser.add_argument("--bundles", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--note", default="", help="what a reader should know of the machine's state")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for name in ("count", "samples", "steps"):
        if (given := getattr(options, name)) < 1:
            parser.error(f"--{name} is {given}: give at least 1")
    command = shlex.join(["python", "-m", "allaprima.benchmarks.int8", *arguments])
    try:
        print(_measure(options, command))
    except AllaprimaError as error:
        parser.error(str(error))


def _measure(options: argparse.Namespace, command: str) -> str:
    able = {(info.name, precision) for info in backends() for precision in info.precisions}
    ways = [way for way in WAYS if (way.backend, way.precision) in able]
    source = open_bundle(resolve(options.bundle))
    calibration = Calibration(
        training_captions(options.samples + 1), options.samples, options.steps, GUIDANCE, seed=1000
    )
    made = {"": source} | {
        name: _quantize(source, options.bundles / f"{source.manifest.name}-{name}", calibration, most)
        for name, most in QUANTIZED.items()
    }
    scenes, texts = held_out(options.count)
    threads = read_machine().cores
    with ExitStack() as opened:
        pipelines = {
            way.name: opened.enter_context(
                Pipeline.open(
                    made[way.bundle].folder,
                    backend=way.backend,
                    precision=way.precision,
                    threads=threads,
                )
            )
            for way in ways
        }
        painted = paint_all(pipelines, scenes, texts, options.steps, _tell)
    results = describe(scenes, painted)
    introduction = (
        f"{source.manifest.name}, {options.count} held-out captions, one seed each, {options.steps} steps, "
        f"guidance {GUIDANCE:g}, all ways taking turns. Ranges are those of {options.samples} pictures of "
        f"other captions. {options.note}".rstrip()
    )
    quantized = {name: _quantization(made[name]).to_json() for name in QUANTIZED}
    about = {**stamp(command, source.manifest.name, threads), "captions": options.count, "note": options.note}
    result = {**about, "quantized": quantized, "results": results}
    lines = [introduction, "", *tabulate_quantized(quantized), "", *tabulate(results)]
    return write_result(options.results, f"int8-{source.manifest.name}", result, lines)


def _quantize(source: Bundle, target: Path, calibration: Calibration, most: float | None) -> Bundle:
    return quantize_bundle(
        source,
        target,
        calibration,
        most=most,
        overwrite=True,
        progress=lambda progress: _tell(f"{target.name}: {progress.stage}"),
    )


def _quantization(bundle: Bundle) -> Quantization:
    found = bundle.component("denoiser").quantization
    assert found is not None
    return found


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
