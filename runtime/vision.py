"""CLIP's image encoders: how a picture is prepared for one, and the one that makes embeddings of pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from allaprima.bundle import Bundle, BundleError, Record
from allaprima.runtime.session import Session
from allaprima.runtime.stages import not_finite

COMPONENT = "image_encoder"
FILE = f"{COMPONENT}/settings.json"
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class VisionSettings(Record):
    """How pictures are prepared: `size` in pixels, `mean` and `std` per channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def prepare(image: Image.Image, settings: VisionSettings) -> Floats:
    """What CLIP's image encoder takes, [3,size,size]: resized by the short side, the middle, normalised."""
    size, short = settings.size, min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    cropped = np.asarray(resized.crop((left, top, left + size, top + size)), np.float32)
    mean, std = np.array(settings.mean, np.float32), np.array(settings.std, np.float32)
    return ((cropped / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32)


class VisionEncoder:
    """A session of the component image_encoder with its settings."""

    def __init__(self, bundle: Bundle, session: Session) -> None:
        """Raises BundleError if the bundle's settings cannot be read."""
        try:
            text = bundle.path(FILE).read_text(encoding="utf-8")
            self._settings = VisionSettings.from_json(json.loads(text))
        except (OSError, ValueError) as cause:
            raise BundleError(f"the settings of the image encoder cannot be read: {cause}") from cause
        self._precision = session.precision
        self._input, self._output = (
            session.memory.allocate(
                {name: (spec.resolve({"B": 1}), spec.dtype) for name, spec in specs.items()}
            )
            for specs in (session.inputs, session.outputs)
        )
        self._binding = session.bind({**self._input.tensors, **self._output.tensors})

    def embed(self, image: Image.Image) -> Floats:
        """The embedding [D] of an RGB picture. Raises BackendError, also for values that are not finite."""
        self._input.tensors["pixel_values"].array[0] = prepare(image, self._settings)
        self._input.push()
        self._binding.run()
        self._output.pull()
        embeds: Floats = self._output.tensors["image_embeds"].array[0].copy()
        if not np.isfinite(embeds).all():
            raise not_finite(COMPONENT, self._precision)
        return embeds
