"""Small pictures of what is being painted: the clean sample as it looks by now, mapped to colours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from allaprima.bundle import Manifest, Preview, RequestError
from allaprima.runtime import fields
from allaprima.runtime.inpainting import Kept
from allaprima.runtime.samplers import Table
from allaprima.runtime.stages import Denoiser

Floats = NDArray[np.float32]


class Previewer:
    """Paints previews of one request, every few calls of the model."""

    def __init__(self, preview: Preview, every: int, kept: Kept | None) -> None:
        """`kept` is what a mask keeps of a picture; None if there is no mask."""
        self._preview, self._every, self._kept = preview, every, kept

    def paint(self, denoiser: Denoiser, table: Table, row: int) -> tuple[Image.Image, ...]:
        """One small picture for each lane after the call of a row; none if none is due.

        The denoiser's state must have been pulled.
        """
        if not self.due(row):
            return ()
        return self.show(denoiser.sample, denoiser.history[0], table, row)

    def due(self, row: int) -> bool:
        """Whether there are previews after the call of a row."""
        return not (row + 1) % self._every

    def show(self, sample: Floats, prediction: Floats, table: Table, row: int) -> tuple[Image.Image, ...]:
        """One small picture for each sample [B,C,H,W] after the call of a row, which made a prediction."""
        of_sample, of_prediction = table.clean[row]
        clean = of_prediction * prediction
        if of_sample:
            clean += of_sample * sample
        if self._kept is not None:
            self._kept.put_back(clean, 1.0, 0.0)
        return tuple(Image.fromarray(each) for each in colours(self._preview, clean))


def check_preview(every: int | None, manifest: Manifest, *, heard: bool) -> Preview | None:
    """The map of a bundle if previews are asked for; None or 0 steps are none.

    Raises RequestError if the bundle has no map, or there is no callback that they could be handed to.
    """
    if every is None or not fields.whole("preview_every", every, 0):
        return None
    if not heard:
        raise RequestError(
            f"preview_every is {every}, but there is no callback that gets the previews: hand one in, or "
            "leave preview_every out"
        )
    if manifest.preview is None or not manifest.history:
        raise RequestError(
            f"preview_every is {every}, but the bundle {manifest.name} says nothing of how its latents look: "
            "export the checkpoint again, or leave preview_every out"
        )
    return manifest.preview


def colours(preview: Preview, latents: Floats) -> NDArray[np.uint8]:
    """Pixels [B,H,W,3] of clean latents [B,C,H,W]; what is not finite is black."""
    matrix, offset = (np.array(part, np.float32) for part in (preview.matrix, preview.offset))
    values: Floats = np.nan_to_num(latents).transpose(0, 2, 3, 1) @ matrix + offset
    return np.asarray(np.rint(values.clip(0, 1) * 255), np.uint8)
