"""diffusers as a contestant: torch eager, and compiled by torch."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allaprima.benchmarks.contestants import Contestant, Field, Painted
from allaprima.benchmarks.plan import Settings, Work
from allaprima.bundle import RequestError

FIRST = """
import sys, torch, diffusers
checkpoint, dtype, device, prompt, steps, width, height, guidance, threads, picture = sys.argv[1:]
torch.set_num_threads(int(threads))
pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(
    checkpoint, dtype=getattr(torch, dtype), local_files_only=True)
pipeline.safety_checker = None
pipeline.to(device)
generator = torch.Generator("cpu").manual_seed(7)
result = pipeline(prompt, num_inference_steps=int(steps), width=int(width), height=int(height),
                  guidance_scale=float(guidance), generator=generator)
result.images[0].save(picture)
"""
"""A small program that paints one picture."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def eager(field: Field) -> list[Contestant]:
    """On the CPU in fp32 and bf16, on a GPU in fp16."""
    checkpoint = _checkpoint(field)
    return [
        Contestant(
            f"diffusers-{precision}",
            precision,
            functools.partial(DiffusersPainter, checkpoint, precision, field.gpu, False),
            functools.partial(_command, checkpoint, precision, field.gpu),
        )
        for precision in _precisions(field)
    ]


def compiled(field: Field) -> list[Contestant]:
    """As `eager`, compiled; without a first picture, which would be mostly its compiler's time."""
    checkpoint = _checkpoint(field)
    return [
        Contestant(
            f"diffusers-compile-{precision}",
            precision,
            functools.partial(DiffusersPainter, checkpoint, precision, field.gpu, True),
        )
        for precision in _precisions(field)
    ]


def _precisions(field: Field) -> tuple[str, ...]:
    return ("fp16",) if field.gpu else ("fp32", "bf16")


def _checkpoint(field: Field) -> Path:
    if field.checkpoint is None:
        raise RequestError("diffusers reads a checkpoint: give --checkpoint DIR, the one of the bundle")
    if not (field.checkpoint / "model_index.json").is_file():
        raise RequestError(f"{field.checkpoint} is no diffusers folder: it has no model_index.json")
    return field.checkpoint


class DiffusersPainter:
    """See Painter: a pipeline of diffusers, weights on the GPU in the channels-last layout."""

    def __init__(
        self,
        checkpoint: Path,
        precision: str,
        gpu: bool,
        compiled: bool,
        settings: Settings,
        works: Sequence[Work],
    ) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        self.settings, self._gpu = settings, gpu
        self._dtype = getattr(torch, DTYPES[precision])
        self._pipeline = _open(checkpoint, self._dtype, settings.sampler)
        if gpu:
            self._pipeline.to("cuda")
            for part in (self._pipeline.unet, self._pipeline.vae):
                part.to(memory_format=torch.channels_last)
        if compiled:
            mode = "max-autotune-no-cudagraphs" if gpu else "default"
            # On the CPU weights are packed for its matrix units only if they are constants.
            torch._inductor.config.freezing = not gpu
            # For each shape its own code: from the second on torch would make one for any, which is slower.
            torch._dynamo.config.recompile_limit = max(8, 2 * len({work.shape for work in works}))
            self._pipeline.unet = torch.compile(self._pipeline.unet, mode=mode, dynamic=False)
            self._pipeline.vae.decode = torch.compile(self._pipeline.vae.decode, dynamic=False)

    def paint(self, work: Work) -> Painted:
        """See Painter."""
        return paint(self._pipeline, self.settings, work)

    def host_memory(self) -> int | None:
        """See Painter: it paints in this process."""
        return None

    def device_memory(self) -> int | None:
        """See Painter."""
        import torch

        return int(torch.cuda.max_memory_reserved()) if self._gpu else None

    def close(self) -> None:
        """See Painter."""
        del self._pipeline


def paint(pipeline: Any, settings: Settings, work: Work) -> Painted:
    """Paint with a pipeline of diffusers; the n-th picture of a batch has the n-th seed from the first on."""
    import torch

    # Drawn in float32 and then rounded: the pipeline would draw other numbers in bf16, another picture.
    factor = pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, work.height // factor, work.width // factor)
    seeds = range(settings.seed, settings.seed + work.batch)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    drawn = [torch.randn(shape, generator=generator) for generator in generators]
    latents = torch.cat(drawn).to(pipeline.device, pipeline.unet.dtype)
    images = pipeline(
        settings.prompt,
        num_inference_steps=work.steps,
        guidance_scale=settings.guidance_scale,
        height=work.height,
        width=work.width,
        num_images_per_prompt=work.batch,
        latents=latents,
        generator=generators,
    ).images
    return Painted(images)


def configure(pipeline: Any, sampler: str | None) -> Any:
    """The same pipeline with a sampler, saying nothing."""
    import diffusers

    from allaprima.runtime.samplers.catalog import find

    pipeline.set_progress_bar_config(disable=True)
    if sampler is not None:
        info = find(sampler)
        scheduler = getattr(diffusers, info.scheduler)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **info.overrides)
    return pipeline


def silence() -> None:
    """Keep the libraries' advice and progress to themselves."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _open(checkpoint: Path, dtype: Any, sampler: str | None) -> Any:
    import diffusers

    silence()
    pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(
        checkpoint, dtype=dtype, local_files_only=True, **_unchecked(checkpoint)
    )
    return configure(pipeline, sampler)


def _unchecked(checkpoint: Path) -> dict[str, Any]:
    """What leaves out the safety checker, of pipelines that have one."""
    index = json.loads((checkpoint / "model_index.json").read_text(encoding="utf-8"))
    return {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}


def _command(
    checkpoint: Path, precision: str, gpu: bool, settings: Settings, work: Work, picture: Path
) -> list[str]:
    numbers = (work.steps, work.width, work.height, settings.guidance_scale, settings.threads)
    device = "cuda" if gpu else "cpu"
    return [
        *(sys.executable, "-c", FIRST, os.fspath(checkpoint), DTYPES[precision], device, settings.prompt),
        *(*map(str, numbers), os.fspath(picture)),
    ]
