"""A hint: a picture of depths, bright where it is near, that some models paint after."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from allaprima.bundle import Manifest, RequestError
from allaprima.runtime.pictures import Source, read_picture
from allaprima.runtime.session import Session
from allaprima.runtime.stages import not_finite

COMPONENT = "hint_encoder"
EMBEDS = "hint_embeds"
"""The condition of the denoiser."""
Floats = NDArray[np.float32]


def read_hint(source: Source | None, manifest: Manifest) -> Image.Image | None:
    """The hint of a request.

    Raises RequestError: as `read_picture`, or if the model takes none, or cannot paint without.
    """
    taken = COMPONENT in manifest.components
    if source is None:
        if taken:
            raise RequestError("this model paints after a depth map: hand one in as `hint`")
        return None
    if not taken:
        raise RequestError("there is a hint, but this model takes none: leave it out")
    return read_picture(source, "hint")


class HintEncoder:
    """A session of the component hint_encoder, for latents of `height` x `width`."""

    def __init__(self, session: Session, height: int, width: int) -> None:
        self._precision = session.precision
        extents = {"B": 1, "H": height, "W": width}
        self._input, self._output = (
            session.memory.allocate(
                {name: (spec.resolve(extents), spec.dtype) for name, spec in specs.items()}
            )
            for specs in (session.inputs, session.outputs)
        )
        self._binding = session.bind({**self._input.tensors, **self._output.tensors})

    def encode(self, hint: Image.Image) -> Floats:
        """What the denoiser takes of an RGB picture, [C,H,W]. Raises BackendError, also if it is not finite.

        The picture is resized to the size that the graph reads, without regard to its proportions. Linearly:
        depths between two others, and none beyond.
        """
        pixels = self._input.tensors["hint"].array
        resized = hint.resize(pixels.shape[:1:-1], Image.Resampling.BILINEAR)
        pixels[0] = np.asarray(resized, np.float32).transpose(2, 0, 1) / 255
        self._input.push()
        self._binding.run()
        self._output.pull()
        embeds: Floats = self._output.tensors[EMBEDS].array[0]
        if not np.isfinite(embeds).all():
            raise not_finite(COMPONENT, self._precision)
        return embeds
