"""stable-diffusion.cpp as a contestant, through its Python package."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from allaprima.benchmarks.compatible import has_clip_tokens, write_compatible
from allaprima.benchmarks.contestants import Contestant, Field
from allaprima.benchmarks.peer_files import prepared, require_checkpoint
from allaprima.benchmarks.peer_worker import Program, ProgramPainter, interpreter, variable, versions_there
from allaprima.benchmarks.plan import Settings, Work
from allaprima.bundle import BackendError, RequestError

NAME = "stable-diffusion-cpp"
SAMPLERS = {"euler": "euler", "heun": "heun"}
"""Our names of samplers that are the same computation there, and its own."""
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
WIDTHS = [[320, 640, 1280, 1280], [320, 640, 1280]]
"""Channels of the UNets whose form it has built in: Stable Diffusion 1.x and SDXL."""
TYPES = {"fp16": "f16", "int8": "q8_0"}
"""Its names of what weights are kept in; sums are in fp32, and q8_0 rounds the weights: not like for like."""


def contestants(field: Field) -> list[Contestant]:
    """With weights in fp16, and in 8 bits."""
    checkpoint = require_checkpoint(NAME, field)
    if field.gpu:
        raise BackendError(f"{NAME} is compared on the CPU alone")
    unet = json.loads((checkpoint / "unet" / "config.json").read_text(encoding="utf-8"))
    if list(unet["block_out_channels"]) not in WIDTHS:
        raise BackendError(
            f"{NAME} has the form of Stable Diffusion's networks built in: it cannot run a UNet of "
            f"{unet['block_out_channels']} channels"
        )
    python = interpreter(
        NAME,
        "stable_diffusion_cpp",
        "pip install stable-diffusion-cpp-python (it compiles for half an hour), here or in another "
        f"environment that --peer-python {NAME}=PYTHON or the variable {variable(NAME)} names",
        default=sys.executable,
    )
    versions = versions_there(NAME, python, ("stable-diffusion-cpp-python", "numpy"))
    folder = prepared(NAME, checkpoint, versions, write_compatible)
    same = has_clip_tokens(checkpoint)
    return [
        Contestant(
            f"{NAME}-{each}",
            each,
            functools.partial(CppPainter, python, folder, each),
            same_picture=same,
            checkpoint=checkpoint,
            versions=versions,
        )
        for each in TYPES
    ]


class CppPainter(ProgramPainter):
    """See Painter. It is told the sigmas that diffusers would take, so that its pictures can be compared."""

    def __init__(
        self, python: str, folder: Path, precision: str, settings: Settings, works: Sequence[Work]
    ) -> None:
        config = folder / "scheduler" / "scheduler_config.json"
        self._scheduler = json.loads(config.read_text(encoding="utf-8"))
        prediction = self._scheduler.get("prediction_type", "epsilon")
        if settings.sampler not in SAMPLERS or prediction not in PREDICTIONS:
            raise RequestError(
                f"{NAME} has no sampler {settings.sampler or 'of this checkpoint'}: give --sampler, one of "
                f"{', '.join(SAMPLERS)}"
            )
        options = {
            "folder": str(folder),
            "threads": settings.threads,
            "precision": TYPES[precision],
            "guidance_scale": settings.guidance_scale,
            "sampler": SAMPLERS[settings.sampler],
            "prediction": PREDICTIONS[prediction],
        }
        super().__init__(Program(python, NAME, options), settings, works)

    def request(self, work: Work) -> dict[str, Any]:
        """See ProgramPainter."""
        return {**super().request(work), "sigmas": euler_sigmas(self._scheduler, work.steps)}


def euler_sigmas(scheduler: dict[str, Any], steps: int) -> list[float]:
    """The sigmas of diffusers' EulerDiscreteScheduler with a checkpoint's configuration, 0 at the end."""
    from allaprima.runtime.samplers.euler import EulerOptions
    from allaprima.runtime.schedule import read_options, sigmas_of, spaced_timesteps, training_alphas

    options = read_options(EulerOptions, scheduler)
    table = sigmas_of(training_alphas(options))
    found = np.interp(spaced_timesteps(options, steps), np.arange(len(table)), table)
    return [*map(float, found), 0.0]
