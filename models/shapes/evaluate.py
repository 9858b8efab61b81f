"""Score `shapes` on held-out captions: python -m allaprima.models.shapes.evaluate [BUNDLE or CHECKPOINT]."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--grid", type=Path, help="write the first 48 pictures as one")
    parser.add_argument("--captioned", type=Path, help="write the first 12 pictures with their captions")
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
    if options.captioned:
        captioned(pictures[:12], texts[:12]).save(options.captioned)


def captioned(pictures: list[Picture], texts: list[str], columns: int = 4) -> Image.Image:
    """The pictures, doubled, in rows, each above its caption."""
    side, foot, gap = 256, 54, 16
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + foot + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for index, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x = gap + index % columns * (side + gap)
        y = gap + index // columns * (side + foot + gap)
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (x, y))
        draw.rectangle((x, y, x + side - 1, y + side - 1), outline=(208, 208, 208))
        draw.multiline_text(
            (x, y + side + 5), textwrap.fill(text, 38), fill=(48, 48, 48), font=font, spacing=3
        )
    return sheet


if __name__ == "__main__":
    main()
