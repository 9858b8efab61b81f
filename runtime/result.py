"""What a pipeline reports while it paints and hands over when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from allaprima.runtime.micro_conditioning import MicroConditioning

Stage = Literal["prior", "encode", "denoise", "decode"]


@dataclass(frozen=True)
class Progress:
    """`step` of `total` in a stage is done.

    `sample` is a read-only view of the latents [B,C,H,W], in the sampler's own space, or in the stage "prior"
    of the embeddings [B,D,1,1] that are sampled there; it is overwritten by later steps, so copy what is to
    be kept. `previews` are small pictures of what the model expects to paint,
    one for each, a pixel for each latent, if they were asked for and are due after this step; no safety
    checker has looked at them.
    """

    stage: Stage
    step: int
    total: int
    sample: NDArray[np.float32]
    previews: tuple[Image, ...] = ()


@dataclass(frozen=True)
class Parameters:
    """How one picture was made: enough to make it again. `height` and `width` in pixels.

    `sampling` holds the fields of Sampling that were given, as JSON has them, and can be handed in again.
    Pictures are not kept: in a `mix` None stands for one. `precision` is "int8+bf16" where large layers of
    the denoiser compute in int8 and all else in bf16.
    """

    prompt: str
    negative_prompt: str | None
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    seed: int
    height: int
    width: int
    eta: float
    bundle: str
    backend: str
    precision: str
    version: str
    long_prompts: bool = False
    prompt_weights: bool = False
    clip_skip: int = 0
    guidance_rescale: float = 0.0
    strength: float | None = None
    variation_seed: int | None = None
    variation_strength: float = 0.0
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    micro_conditioning: MicroConditioning | None = None
    refiner: str | None = None
    prior_num_inference_steps: int | None = None
    prior_guidance_scale: float | None = None
    mix: tuple[tuple[str | None, float], ...] | None = None
    prior_strength: float | None = None
    prior_negative_prompt: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    cache_interval: int = 1


@dataclass(frozen=True)
class MemoryUse:
    """What was done for one request to stay within a memory limit. Bytes are estimates: see docs/memory.md.

    `peak` is the most that was held at once, `components` the most that each held, `loaded` and `unloaded`
    are in order, `seconds` went into both.
    """

    limit: int
    peak: int
    components: Mapping[str, int]
    loaded: tuple[str, ...]
    unloaded: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Result:
    """The pictures of one request.

    `parameters[i]` belongs to `images[i]`. `timings` holds seconds for each stage and "total". `warnings`
    are sentences for the user, such as the part of a prompt that was too long. `flagged` says which pictures
    the model's safety checker flagged, and so are blurred; None if there is none, or it is switched off.
    `latents` [N,C,H,W] are in place of images where a request had the output_type "latent", else None.
    `memory` is None where there is no memory limit.
    """

    images: tuple[Image, ...]
    parameters: tuple[Parameters, ...]
    timings: Mapping[str, float]
    warnings: tuple[str, ...]
    flagged: tuple[bool, ...] | None = None
    latents: NDArray[np.float32] | None = None
    memory: MemoryUse | None = None
