"""The denoising loop, and what a callback is told of it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from allaprima.runtime.inpainting import Kept
from allaprima.runtime.noise import Draws, Noise
from allaprima.runtime.preview import Previewer
from allaprima.runtime.result import Progress, Stage
from allaprima.runtime.samplers import Table
from allaprima.runtime.settings import Settings
from allaprima.runtime.stages import Denoiser
from allaprima.runtime.step_cache import is_full

Callback = Callable[[Progress], None]


def guide(denoiser: Denoiser, settings: Settings, offset: float) -> None:
    """Write the weights of the guidance branches; `offset` as of Conventions."""
    scale = settings.guidance_scale + offset
    denoiser.guidance[...] = [[1 - scale], [scale]] if settings.branches == 2 else 1
    if denoiser.guidance_rescale is not None:
        denoiser.guidance_rescale[...] = settings.guidance_rescale if settings.branches == 2 else 0


def denoise(
    denoiser: Denoiser,
    table: Table,
    streams: list[Noise],
    kept: Kept | None,
    callback: Callback | None,
    previewer: Previewer | None,
    interval: int = 1,
) -> None:
    """Take all steps of a table, every `interval`-th of them in full.

    `streams` are the pictures' noise, `kept` is what a mask keeps.
    """
    total = len(table.timesteps)
    draws = Draws(streams)
    for row in range(total):
        denoiser.write(table, row)
        if table.draws[row]:
            draws.fill(denoiser.noise, float(table.echoes[row]))
            denoiser.push_noise()
        denoiser.step(full=is_full(row, interval))
        if kept is not None and table.levels is not None:
            denoiser.pull()
            kept.restore(denoiser.sample, table.levels, row)
            denoiser.push()
        if callback is not None:
            denoiser.pull()
            previews = () if previewer is None else previewer.paint(denoiser, table, row)
            callback(Progress("denoise", row + 1, total, _seen(denoiser.sample), previews))


Part = TypeVar("Part")
Made = TypeVar("Made")


def run_out(parts: Generator[Part, None, Made], watch: Callable[[Part], None] | None = None) -> Made:
    """What a generator returns; `watch` is told what it yields, and may raise to stop."""
    while True:
        try:
            part = next(parts)
        except StopIteration as end:
            made: Made = end.value
            return made
        if watch is not None:
            watch(part)


def tell(callback: Callback | None, stage: Stage, step: int, total: int, denoiser: Denoiser) -> None:
    """Tell a callback, if there is one, with the present latents."""
    if callback is not None:
        denoiser.pull()
        callback(Progress(stage, step, total, _seen(denoiser.sample)))


def _seen(sample: NDArray[np.float32]) -> NDArray[np.float32]:
    """The latents, which a callback must not change."""
    sample = sample.view()
    sample.flags.writeable = False
    return sample
