"""OpenVINO GenAI's Text2ImagePipeline as a contestant."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from allaprima.benchmarks.contestants import Contestant, Field, Painted
from allaprima.benchmarks.openvino_models import PACKAGES, write_openvino
from allaprima.benchmarks.peer_files import Shapes, prepared, require_checkpoint, require_packages
from allaprima.benchmarks.plan import Settings, Work
from allaprima.benchmarks.report import installed
from allaprima.bundle import BackendError, RequestError

NAME = "openvino-genai"
MODULES = ("openvino", "openvino_genai", "openvino_tokenizers", "torch", "diffusers", "transformers")
"""Some run the model, all are needed to make it of a checkpoint."""
HINTS = {"fp32": "f32", "bf16": "bf16"}
"""Its names of precisions."""
SCHEDULERS = {
    "DDIMScheduler": "DDIM",
    "EulerDiscreteScheduler": "EULER_DISCRETE",
    "EulerAncestralDiscreteScheduler": "EULER_ANCESTRAL_DISCRETE",
    "LCMScheduler": "LCM",
    "PNDMScheduler": "PNDM",
}
"""Those of diffusers that it has; its LMS is DDIM by another name, so that one is not meant."""


def contestants(field: Field) -> list[Contestant]:
    """In bf16, where it is what OpenVINO takes by itself, and in fp32."""
    if field.gpu:
        raise BackendError(f"{NAME} runs on no NVIDIA GPU: compare on the CPU")
    checkpoint = require_checkpoint(NAME, field)
    require_packages(NAME, MODULES, "pip install 'allaprima[bench,export,openvino]'")
    folder = prepared(NAME, checkpoint, installed(PACKAGES), write_openvino)
    return [
        Contestant(
            f"{NAME}-{precision}",
            precision,
            functools.partial(GenaiPainter, folder, precision),
            checkpoint=checkpoint,
        )
        for precision in precisions()
    ]


def precisions() -> tuple[str, ...]:
    """What OpenVINO is worth comparing in on this processor."""
    from allaprima.runtime import backends

    bf16 = any(info.name == "openvino" and "bf16" in info.precisions for info in backends())
    return ("bf16", "fp32") if bf16 else ("fp32",)


def choose_scheduler(sampler: str | None, given: str) -> str:
    """Its name of a sampler of ours, or of a checkpoint's scheduler. Raises RequestError if it has none."""
    from allaprima.runtime.samplers.catalog import find

    info = None if sampler is None else find(sampler)
    wanted = given if info is None else info.scheduler
    if wanted in SCHEDULERS and (info is None or not info.overrides):
        return SCHEDULERS[wanted]
    names = ", ".join(find(name).name for name in SCHEDULERS)
    raise RequestError(
        f"{NAME} has no {given if info is None else info.name}: give --sampler, one of {names}"
    )


class GenaiPainter:
    """See Painter: compiled for one shape at a time, as its documentation advises."""

    def __init__(self, folder: Path, precision: str, settings: Settings, works: Sequence[Work]) -> None:
        self.settings, self._folder = settings, folder
        self._properties = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": settings.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._pipeline: Any = None
        self._shapes = Shapes(works)
        self._open()

    def _open(self) -> None:
        import openvino_genai

        self._pipeline = None  # before another takes its place in memory
        pipeline = openvino_genai.Text2ImagePipeline(self._folder)
        pipeline.set_scheduler(self._scheduler())
        if self._shapes.fixed is not None:
            batch, width, height = self._shapes.fixed
            pipeline.reshape(batch, height, width, self.settings.guidance_scale)
        pipeline.compile("CPU", **self._properties)
        self._pipeline = pipeline

    def _scheduler(self) -> Any:
        import openvino_genai

        path = self._folder / "scheduler" / "scheduler_config.json"
        given = json.loads(path.read_text(encoding="utf-8"))["_class_name"]
        kind = getattr(openvino_genai.Scheduler.Type, choose_scheduler(self.settings.sampler, given))
        return openvino_genai.Scheduler.from_config(path, kind)

    def paint(self, work: Work) -> Painted:
        """See Painter."""
        if self._shapes.changed(work):
            self._open()
        settings = self.settings
        made = self._pipeline.generate(
            settings.prompt,
            num_inference_steps=work.steps,
            guidance_scale=settings.guidance_scale,
            width=work.width,
            height=work.height,
            num_images_per_prompt=work.batch,
            generator=_generator(settings.seed),
        )
        images = [Image.fromarray(picture) for picture in made.data]
        return Painted(images, self._stages())

    def _stages(self) -> dict[str, float]:
        """Its own clock, of the networks alone: what the denoiser's loop takes beside them is not in it."""
        metrics = self._pipeline.get_performance_metrics()
        text = sum(metrics.get_text_encoder_infer_duration().values())
        whole, decode = metrics.get_generate_duration(), metrics.get_vae_decoder_infer_duration()
        return {
            "text": text / 1000,
            "denoise": (whole - text - decode) / 1000,
            "decode": decode / 1000,
        }

    def host_memory(self) -> int | None:
        """See Painter: it paints in this process."""
        return None

    def close(self) -> None:
        """See Painter."""
        self._pipeline = None


def _generator(seed: int) -> Any:
    """Our noise, which is torch's: each picture of a batch has the next seed."""
    import numpy as np
    import openvino
    import openvino_genai

    from allaprima.runtime.noise import Noise

    class SeededNoise(openvino_genai.Generator):  # type: ignore[misc]
        """Draws every picture's noise from a stream of its own."""

        def __init__(self) -> None:
            super().__init__()
            self._streams: list[Noise] = []

        def next(self) -> float:
            """A single number, of the first stream."""
            return float(self.randn_tensor([1]).data[0])

        def randn_tensor(self, shape: Any) -> Any:
            """Normal numbers of a shape whose first axis is the batch."""
            sizes = [int(size) for size in shape]
            while len(self._streams) < sizes[0]:
                self._streams.append(Noise(seed + len(self._streams)))
            parts = [stream.normal((1, *sizes[1:])) for stream in self._streams[: sizes[0]]]
            return openvino.Tensor(np.concatenate(parts))

    return SeededNoise()
