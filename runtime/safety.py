"""Which pictures a checkpoint's safety checker flags, and what is shown in their place."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from allaprima.bundle import Bundle, BundleError
from allaprima.runtime.session import Session
from allaprima.runtime.vision import VisionSettings, prepare

COMPONENT = "safety_checker"
FILE = f"{COMPONENT}/settings.json"


@dataclass(frozen=True)
class SafetySettings(VisionSettings):
    """How pictures are prepared, and a threshold per concept."""

    special: tuple[float, ...]
    concepts: tuple[float, ...]


class SafetyChecker:
    """A session of the component safety_checker with its settings."""

    def __init__(self, bundle: Bundle, session: Session) -> None:
        """Raises BundleError if the bundle's settings cannot be read."""
        try:
            text = bundle.path(FILE).read_text(encoding="utf-8")
            self._settings = SafetySettings.from_json(json.loads(text))
        except (OSError, ValueError) as cause:
            raise BundleError(f"the settings of the safety checker cannot be read: {cause}") from cause
        settings, memory = self._settings, session.memory
        size = settings.size
        self._input = memory.allocate({"clip_input": ((1, 3, size, size), np.float32)})
        self._outputs = memory.allocate(
            {
                "special": ((1, len(settings.special)), np.float32),
                "concepts": ((1, len(settings.concepts)), np.float32),
            }
        )
        self._binding = session.bind({**self._input.tensors, **self._outputs.tensors})

    def flags(self, image: Image.Image) -> bool:
        """Whether an RGB picture shows one of the concepts. Raises BackendError."""
        self._input.tensors["clip_input"].array[0] = prepare(image, self._settings)
        self._input.push()
        self._binding.run()
        self._outputs.pull()
        special, concepts = (self._outputs.tensors[name].array[0] for name in ("special", "concepts"))
        return is_flagged(special, concepts, self._settings)


def is_flagged(special: NDArray[np.float32], concepts: NDArray[np.float32], settings: SafetySettings) -> bool:
    """The decision of StableDiffusionSafetyChecker, from the cosines with its two lists of concepts.

    Scores are rounded to three decimals. A special concept flags nothing, but lowers all later thresholds by
    0.01, those of the special concepts after it included.
    """
    lower = np.float32(0)
    for margin in special - np.array(settings.special, np.float32):
        if np.rint((margin + lower) * 1000) > 0:
            lower = np.float32(0.01)
    margins = concepts - np.array(settings.concepts, np.float32) + lower
    return bool((np.rint(margins * 1000) > 0).any())


def blurred(image: Image.Image) -> Image.Image:
    """The picture, so far out of focus that only its colours can be told."""
    return image.filter(ImageFilter.GaussianBlur(max(image.size) / 12))


def warn_flagged(flagged: tuple[bool, ...] | None) -> tuple[str, ...]:
    """Sentences on the pictures that were flagged."""
    return tuple(
        f"picture {index + 1} was flagged by the model's safety checker and is blurred"
        for index, each in enumerate(flagged or ())
        if each
    )
