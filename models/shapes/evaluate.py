"""Score `shapes` on held-out captions: python -m allaprima.models.shapes.evaluate [BUNDLE or CHECKPOINT]."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from allaprima.models.shapes.captions import caption
from allaprima.models.shapes.checker import Picture, score
from allaprima.models.shapes.scenes import Scene, draw_split

Paint = Callable[[str, int, Scene], Picture]


def held_out(count: int) -> tuple[list[Scene], list[str]]:
    """The scenes and captions of the test, the same on every machine; none was seen in training."""
    random = np.random.default_rng((11, 7))
    scenes = [draw_split(random, held_out=True) for _ in range(count)]
    return scenes, [caption(scene, random) for scene in scenes]


def from_checkpoint(folder: Path, steps: int, guidance: float) -> Paint:
    """Paint with diffusers' StableDiffusionPipeline."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def paint(text: str, seed: int, scene: Scene) -> Picture:
        picture = pipeline(
            text,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=scene.height,
            width=scene.width,
            generator=torch.Generator("cpu").manual_seed(seed),
        )
        return np.asarray(picture.images[0])

    return paint


def from_bundle(bundle: str, steps: int, guidance: float, backend: str) -> Paint:
    """Paint with the runtime."""
    from allaprima.runtime import Pipeline

    pipeline = Pipeline.open(bundle, backend=backend)

    def paint(text: str, seed: int, scene: Scene) -> Picture:
        result = pipeline.generate(
            text,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
            height=scene.height,
            width=scene.width,
        )
        return np.asarray(result.images[0])

    return paint


def main() -> None:
    """Print the score as JSON; `--grid` also writes the first pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="shapes")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--grid", type=Path, help="write the first 48 pictures as one")
    options = parser.parse_args()
    scenes, texts = held_out(options.count)
    if (Path(options.model) / "model_index.json").exists():
        paint = from_checkpoint(Path(options.model), options.steps, options.guidance)
    else:
        paint = from_bundle(options.model, options.steps, options.guidance, options.backend)
    pictures: list[Picture] = []

    def keep(index: int, scene: Scene) -> Picture:
        pictures.append(paint(texts[index], index, scene))
        return pictures[-1]

    result = score(scenes, keep)
    report = {"captions": result.captions, "things": result.things, "relation": result.relation}
    print(json.dumps({**report, "failures": [texts[index] for index in result.failures[:20]]}, indent=2))
    if options.grid:
        rows = [
            np.concatenate(pictures[k : k + 8], axis=1) for k in range(0, min(48, len(pictures)) // 8 * 8, 8)
        ]
        Image.fromarray(np.concatenate(rows)).save(options.grid)


if __name__ == "__main__":
    main()
