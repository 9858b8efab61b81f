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
    gpu: bool = False

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


def open_ort_cuda(bundle: Path, precision: str, settings: Settings) -> Paint:
    """Our runtime on ONNX Runtime's CUDA provider, in the precision of the bundle."""
    return _open_allaprima("ort-cuda", bundle, precision, settings)


def open_tensorrt(bundle: Path, precision: str, settings: Settings) -> Paint:
    """Our runtime on TensorRT, with engines for this size alone."""
    return _open_built("tensorrt", bundle, precision, settings)


def open_tensorrt_rtx(bundle: Path, precision: str, settings: Settings) -> Paint:
    """Our runtime on TensorRT-RTX, with engines for this size alone."""
    return _open_built("tensorrt-rtx", bundle, precision, settings)


def open_openvino_fixed(bundle: Path, precision: str, settings: Settings) -> Paint:
    """Our runtime on OpenVINO, with engines for this size beside those for all."""
    return _open_built("openvino", bundle, precision, settings)


def _open_built(backend: str, bundle: Path, precision: str, settings: Settings) -> Paint:
    from allaprima.bundle import open_bundle
    from allaprima.engine import build_bundle

    sizes = [(settings.width, settings.height)]
    build_bundle(open_bundle(bundle), backend=backend, precision=precision, sizes=sizes)
    return _open_allaprima(backend, bundle, precision, settings)


def open_diffusers_cuda(checkpoint: Path, precision: str, settings: Settings) -> Paint:
    """StableDiffusionPipeline on the GPU, torch eager, weights in the channels-last layout."""
    return open_diffusers(checkpoint, precision, settings, device="cuda")


def open_diffusers_compiled(checkpoint: Path, precision: str, settings: Settings) -> Paint:
    """As `open_diffusers_cuda`, UNet and decoder compiled by torch."""
    return open_diffusers(checkpoint, precision, settings, device="cuda", compiled=True)


def open_diffusers(
    checkpoint: Path, precision: str, settings: Settings, device: str = "cpu", *, compiled: bool = False
) -> Paint:
    """StableDiffusionPipeline in torch, eager or compiled; on the CPU weights lie contiguously."""
    import diffusers
    import torch
    import transformers

    from allaprima.runtime.samplers.catalog import find

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch.set_num_threads(settings.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        checkpoint,
        dtype=dtype,
        local_files_only=True,
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    if device != "cpu":
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if compiled:
        pipeline.unet = torch.compile(pipeline.unet, mode="max-autotune-no-cudagraphs")
        pipeline.vae.decode = torch.compile(pipeline.vae.decode)
    sampler = find(settings.sampler)
    scheduler = getattr(diffusers, sampler.scheduler)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **sampler.overrides)
    shape = (1, pipeline.unet.config.in_channels, settings.height // 8, settings.width // 8)

    def paint(steps: int) -> Image:
        generator = torch.Generator("cpu").manual_seed(settings.seed)
        # Drawn in float32 and then rounded: the pipeline would draw other numbers in bf16, another picture.
        latents = torch.randn(shape, generator=generator).to(device, dtype)
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
        Contestant("allaprima-openvino-bf16-fixed", "bf16", "fp16", open_openvino_fixed),
        Contestant("allaprima-openvino-fp32", "fp32", "fp16", open_openvino),
        Contestant("allaprima-ort-fp32", "fp32", "fp32", open_ort),
        Contestant("allaprima-ort-fp16", "fp16", "fp16", open_ort),
        Contestant("diffusers-bf16", "bf16", None, open_diffusers),
        Contestant(REFERENCE, "fp32", None, open_diffusers),
        Contestant("allaprima-tensorrt-fp16", "fp16", "fp16", open_tensorrt, gpu=True),
        Contestant("allaprima-tensorrt-rtx-fp16", "fp16", "fp16", open_tensorrt_rtx, gpu=True),
        Contestant("allaprima-ort-cuda-fp16", "fp16", "fp16", open_ort_cuda, gpu=True),
        Contestant("diffusers-cuda-fp16", "fp16", None, open_diffusers_cuda, gpu=True),
        Contestant("diffusers-cuda-fp16-compiled", "fp16", None, open_diffusers_compiled, gpu=True),
        Contestant("diffusers-cuda-fp32", "fp32", None, open_diffusers_cuda, gpu=True),
    )
}
