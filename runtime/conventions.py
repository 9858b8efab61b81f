"""How a family of models treats guidance, and pictures that are handed in, where their references differ."""

from __future__ import annotations

from dataclasses import dataclass, replace

from PIL import Image

from allaprima.bundle import Manifest


@dataclass(frozen=True)
class Conventions:
    """What diffusers' pipelines of a family do; by default those of Stable Diffusion.

    `strength` is how much of a picture is painted over if a request does not say, `filter` (with
    `reducing_gap`) how it is resized. `masks_latents`: a model of inpainting is told the picture's latents
    times the mask, 1 where they are kept, after the part to paint has grown by a latent; and what is kept is
    put back after every step. Otherwise it is told the latents of a picture with a hole, and a mask that is 1
    in the hole. `guidance_offset`: what is added to a request's guidance scale where there is guidance, since
    some count it from 0, the prompt alone, and others from 1.
    """

    strength: float = 0.8
    filter: Image.Resampling = Image.Resampling.LANCZOS
    reducing_gap: float | None = None
    masks_latents: bool = False
    guidance_offset: float = 0.0


USUAL = Conventions()
_KANDINSKY = Conventions(0.3, Image.Resampling.BICUBIC, 1.0)
_OTHERS = {
    "kandinsky-2.2": replace(_KANDINSKY, masks_latents=True),
    "kandinsky-3": replace(_KANDINSKY, guidance_offset=1.0),
}


def conventions_of(manifest: Manifest) -> Conventions:
    """Those of a bundle's family."""
    return _OTHERS.get(manifest.family, USUAL)
