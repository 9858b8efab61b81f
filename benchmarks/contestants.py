"""Who is measured: each contestant opens a model and paints with the same settings as all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image


@dataclass(frozen=True)
class Settings:
    """What every contestant is asked for; sizes in pixels. `sampler` is one of `allaprima samplers`."""

    prompt: str
    sampler: str
    seed: int
    guidance_scale: float
    height: int
    width: int
    threads: int


@dataclass(frozen=True)
class Model:
    """A diffusers folder, and the folder where its bundles lie."""

    checkpoint: Path
    bundles: Path

    @property
    def name(self) -> str:
        """What results are called after."""
        return self.checkpoint.parent.name if self.checkpoint.name == "checkpoint" else self.checkpoint.name

    def bundle(self, precision: str) -> Path:
        """The folder of the bundle whose weights have this precision."""
        return self.bundles / f"{self.name}-{precision}"


Paint = Callable[[int], Image]
"""From a number of steps to a picture."""


@dataclass(frozen=True)
class Contestant:
    """A library in its best honest settings.

    `precision` is what it computes in; `weights` that of the bundle it reads, None for one that reads the
    checkpoint. `open` takes the bundle or the checkpoint, the precision and the settings. It is called in a
    process of its own, so everything heavy is imported inside.
    """

    name: str
    precision: str
    weights: str | None
    open: Callable[[Path, str, Settings], Paint]

    def source(self, model: Model) -> Path:
        """What it opens."""
        return model.checkpoint if self.weights is None else model.bundle(self.weights)


def open_ort(bundle: Path, precision: str, settings: Settings) -> Paint:
    """Our runtime on ONNX Runtime, which computes in the precision of the bundle."""
    return _open_allaprima("ort", bundle, precision, settings)


def open_openvino(bundle: Path, precision: str, settings: Settings) -> Paint:
    """Our runtime on OpenVINO, which computes in any precision."""
    return _open_allaprima("openvino", bundle, precision, settings)


def _open_allaprima(backend: str, bundle: Path, precision: str, settings: Settings) -> Paint:
    from allaprima.runtime import Pipeline

    pipeline = Pipeline.open(bundle, backend=backend, precision=precision, threads=settings.threads)

    def paint(steps: int) -> Image:
        result = pipeline.generate(
            settings.prompt,
            num_inference_steps=steps,
            guidance_scale=settings.guidance_scale,
            sampler=settings.sampler,
            seed=settings.seed,
            height=settings.height,
            width=settings.width,
        )
        return result.images[0]

    return paint


def open_diffusers(checkpoint: Path, precision: str, settings: Settings) -> Paint:
    """StableDiffusionPipeline, torch eager on the CPU, weights in the contiguous layout."""
    import diffusers
    import torch
    import transformers

    from allaprima.runtime.samplers.catalog import find

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch.set_num_threads(settings.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        checkpoint,
        dtype=dtype,
        local_files_only=True,
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    sampler = find(settings.sampler)
    scheduler = getattr(diffusers, sampler.scheduler)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **sampler.overrides)
    shape = (1, pipeline.unet.config.in_channels, settings.height // 8, settings.width // 8)

    def paint(steps: int) -> Image:
        generator = torch.Generator("cpu").manual_seed(settings.seed)
        # Drawn in float32 and then rounded: the pipeline would draw other numbers in bf16, another picture.
        latents = torch.randn(shape, generator=generator).to(dtype)
        image: Image = pipeline(
            settings.prompt,
            num_inference_steps=steps,
            guidance_scale=settings.guidance_scale,
            height=settings.height,
            width=settings.width,
            latents=latents,
            generator=generator,
        ).images[0]
        return image

    return paint


REFERENCE = "diffusers-fp32"
"""The contestant whose picture the others should paint too."""

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("allaprima-openvino-bf16", "bf16", "fp16", open_openvino),
        Contestant("allaprima-openvino-fp32", "fp32", "fp16", open_openvino),
        Contestant("allaprima-ort-fp32", "fp32", "fp32", open_ort),
        Contestant("allaprima-ort-fp16", "fp16", "fp16", open_ort),
        Contestant("diffusers-bf16", "bf16", None, open_diffusers),
        Contestant(REFERENCE, "fp32", None, open_diffusers),
    )
}
