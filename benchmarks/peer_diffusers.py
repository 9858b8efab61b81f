"""diffusers as a contestant: torch eager, and compiled by torch."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from allaprima.benchmarks.contestants import Contestant, Field, Painted
from allaprima.benchmarks.peer_files import require_checkpoint, require_folder, require_packages
from allaprima.benchmarks.plan import Settings, Work

FIRST = """
import json, sys, torch, diffusers
asked = json.loads(sys.argv[1])
torch.set_num_threads(asked["threads"])
pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(
    asked["checkpoint"], dtype=getattr(torch, asked["dtype"]), local_files_only=True, **asked["loading"])
if asked["scheduler"]:
    kind = getattr(diffusers, asked["scheduler"])
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **asked["overrides"])
pipeline.to(asked["device"])
generator = torch.Generator("cpu").manual_seed(asked["seed"])
pipeline(asked["prompt"], generator=generator, **asked["request"]).images[0].save(asked["picture"])
"""
"""A small program that paints one picture, as users of diffusers write it."""
NAME = "diffusers"
MODULES = ("accelerate", "diffusers", "torch", "transformers")
REMEDY = "pip install 'allaprima[bench,export]'"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def eager(field: Field) -> list[Contestant]:
    """On the CPU in fp32 and bf16, on a GPU in fp16."""
    return [_eager(_checkpoint(field), precision, field.gpu) for precision in _precisions(field)]


def reference(field: Field) -> Contestant:
    """In fp32 wherever the others are: what pictures are compared with if nobody else computes in it.

    Raises BackendError or RequestError where there is none.
    """
    require_packages(NAME, MODULES, REMEDY)
    return _eager(require_checkpoint(NAME, field), "fp32", field.gpu)


def _eager(checkpoint: Path, precision: str, gpu: bool) -> Contestant:
    return Contestant(
        f"diffusers-{precision}",
        precision,
        functools.partial(DiffusersPainter, checkpoint, precision, gpu, False),
        functools.partial(_command, checkpoint, precision, gpu),
        gpu=gpu,
        checkpoint=checkpoint,
    )


def compiled(field: Field) -> list[Contestant]:
    """As `eager`, compiled; without a first picture, which would be mostly its compiler's time."""
    checkpoint = _checkpoint(field)
    return [
        Contestant(
            f"diffusers-compile-{precision}",
            precision,
            functools.partial(DiffusersPainter, checkpoint, precision, field.gpu, True),
            gpu=field.gpu,
            checkpoint=checkpoint,
        )
        for precision in _precisions(field)
    ]


def _precisions(field: Field) -> tuple[str, ...]:
    return ("fp16",) if field.gpu else ("fp32", "bf16")


def _checkpoint(field: Field) -> Path:
    checkpoint = require_folder(NAME, field)
    require_packages(NAME, MODULES, REMEDY)
    return checkpoint


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
        self.settings = settings
        self._pipeline = _open(checkpoint, getattr(torch, DTYPES[precision]), settings.sampler)
        if gpu:
            if precision == "fp32":  # all of it: torch would convolve in TF32
                torch.backends.cudnn.allow_tf32 = False
            self._pipeline.to("cuda")
            for part in (self._pipeline.unet, self._pipeline.vae):
                part.to(memory_format=torch.channels_last)
        if compiled:
            # On the CPU weights are packed for its matrix units only if they are constants.
            torch._inductor.config.freezing = not gpu
            # For each shape its own code: from the second on torch would make one for any, which is slower.
            torch._dynamo.config.recompile_limit = max(8, 2 * len({work.shape for work in works}))
            compile_on_gpu(self._pipeline) if gpu else compile_on_cpu(self._pipeline)

    def paint(self, work: Work) -> Painted:
        """See Painter."""
        return paint(self._pipeline, self.settings, work)

    def host_memory(self) -> int | None:
        """See Painter: it paints in this process."""
        return None

    def close(self) -> None:
        """See Painter."""
        del self._pipeline


def compile_on_cpu(pipeline: Any) -> None:
    """The UNet and the image decoder of a pipeline, for each shape by itself."""
    import torch

    pipeline.unet = torch.compile(pipeline.unet, dynamic=False)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, dynamic=False)


def compile_on_gpu(pipeline: Any) -> None:
    """As `compile_on_cpu`, each a CUDA graph of the fastest kernels that torch finds.

    A decoder that the pipeline takes to fp32 and back for every picture is only compiled: its weights are in
    another place each time, so that its graph would have to be recorded anew.
    """
    import torch

    vae = pipeline.vae
    moved = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    pipeline.unet.forward = _graphed(pipeline.unet.forward)
    if moved:
        vae.decode = torch.compile(vae.decode, mode="max-autotune-no-cudagraphs", dynamic=False)
    else:
        vae.decode = _graphed(vae.decode)


def _graphed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that gives a tuple of one tensor, as pipelines call it, from a CUDA graph of torch's.

    A replay writes over what the last one gave, and some samplers keep that: so it is copied out, and torch
    is told that nobody needs the graph's own any more.
    """
    import torch

    compiled: Any = torch.compile(function, mode="max-autotune", dynamic=False)

    def run(*arguments: Any, **options: Any) -> tuple[Any, ...]:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        first, *_ = compiled(*arguments, **options)
        return (first.clone(),)

    return run


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
    from allaprima.runtime.samplers.catalog import find

    sampler = None if settings.sampler is None else find(settings.sampler)
    asked = {
        "checkpoint": os.fspath(checkpoint),
        "dtype": DTYPES[precision],
        "device": "cuda" if gpu else "cpu",
        "threads": settings.threads,
        "loading": _unchecked(checkpoint),
        "scheduler": None if sampler is None else sampler.scheduler,
        "overrides": {} if sampler is None else dict(sampler.overrides),
        "seed": settings.seed,
        "prompt": settings.prompt,
        "request": {
            "num_inference_steps": work.steps,
            "width": work.width,
            "height": work.height,
            "guidance_scale": settings.guidance_scale,
        },
        "picture": os.fspath(picture),
    }
    return [sys.executable, "-c", FIRST, json.dumps(asked)]
