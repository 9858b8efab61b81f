"""A request as the pipeline takes it: every field resolved and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from allaprima.bundle import RequestError
from allaprima.runtime.micro_conditioning import MicroConditioning
from allaprima.runtime.prior_request import PriorRequest
from allaprima.runtime.sampling import Sampling

Latents = NDArray[np.float32]
OutputType = Literal["pil", "latent"]


@dataclass(frozen=True)
class Settings:
    """A request with everything resolved but the sampler: None is the bundle's own.

    `height` and `width` in pixels. Image i uses `seed + i`; if there is a variation, all use `seed`, and
    image i `variation_seed + i`. `picture` is what to begin with, or `latents` [N,C,H,W], `strength` None
    if neither is painted over. `guidance_embedded`: the model is told the guidance scale. `hint` is a picture
    of depths.
    """

    prompt: str
    negative_prompt: str | None
    num_inference_steps: int
    guidance_scale: float
    sampler: str | None
    seed: int
    height: int
    width: int
    num_images: int
    eta: float
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    long_prompts: bool = False
    prompt_weights: bool = False
    clip_skip: int = 0
    guidance_rescale: float = 0.0
    strength: float | None = None
    picture: Image.Image | None = None
    latents: Latents | None = None
    variation_seed: int | None = None
    variation_strength: float = 0.0
    mask: Image.Image | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    micro_conditioning: MicroConditioning | None = None
    output_type: OutputType = "pil"
    guidance_embedded: bool = False
    prior_num_inference_steps: int | None = None
    prior_guidance_scale: float | None = None
    prior: PriorRequest = field(default_factory=PriorRequest)
    hint: Image.Image | None = None
    sampling: Sampling = field(default_factory=Sampling)
    cache_interval: int = 1

    @property
    def begin(self) -> int:
        """How many of the first steps are left out, since the picture that was handed in is there already.

        As diffusers counts them: `strength` of the steps are taken, rounded down.
        """
        if self.strength is None:
            return 0
        return self.num_inference_steps - int(self.num_inference_steps * self.strength)

    @property
    def branches(self) -> int:
        """G, the guidance branches: classifier-free guidance acts above 1 only, as in diffusers."""
        return 2 if self.guidance_scale > 1 and not self.guidance_embedded else 1

    def refuse(self, neutral: Mapping[str, object], why: str) -> None:
        """RequestError for fields that a family cannot take, unless they have these neutral values."""
        for name, value in neutral.items():
            if (given := getattr(self, name)) != value:
                raise RequestError(f"{name} is {given}, but {why}: leave it out")

    def check(self, *, needs_mask: bool) -> None:
        """RequestError for fields that contradict one another, or a model of inpainting without a mask."""
        if self.begin == self.num_inference_steps:
            raise RequestError(
                f"strength {self.strength} of {self.num_inference_steps} steps is no step at all: "
                f"raise it to {1 / self.num_inference_steps:.3g} or more, or take more steps"
            )
        start, end = self.denoising_start, self.denoising_end
        if start is not None and self.latents is None:
            raise RequestError(
                f"denoising_start is {start}, but there are no latents to go on from: hand in as `image` the "
                "`latents` of a result that was painted with denoising_end"
            )
        if start is not None and end is not None and start >= end:
            raise RequestError(f"denoising_start {start} is not before denoising_end {end}")
        if needs_mask and self.mask is None:
            raise RequestError("this model paints within a mask: hand in an image and a mask")
