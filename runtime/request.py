"""What a user asks for, checked at the door."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar, cast

import numpy as np
from PIL import Image

from allaprima.bundle import Manifest, RequestError
from allaprima.runtime import fields
from allaprima.runtime.conventions import conventions_of
from allaprima.runtime.hint import read_hint
from allaprima.runtime.inpainting import read_mask
from allaprima.runtime.micro_conditioning import SCORES, SIZES, read_micro_conditioning
from allaprima.runtime.pictures import Source, fitting_size, read_latents, read_picture
from allaprima.runtime.prior_request import Mix, read_prior_request
from allaprima.runtime.samplers import count_steps
from allaprima.runtime.sampling import Sampling
from allaprima.runtime.settings import Latents, OutputType, Settings
from allaprima.runtime.step_cache import read_interval

Number = TypeVar("Number", int, float)

MOST_PIXELS = 1 << 28
"""Of all pictures of a request together, a thousand of 512 x 512: what takes more than a device's memory is
told when it is known, but no memory is asked for on this scale."""
MASKED_STRENGTH = 1.0
"""How much of the part that a mask shows is painted over if a request does not say."""


class Options(TypedDict, total=False):
    """The fields of a Request but the prompt, as keywords."""

    negative_prompt: str | None
    prompt_2: str | None
    negative_prompt_2: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    sampler: str | None
    seed: int | None
    height: int | None
    width: int | None
    num_images: int
    eta: float
    long_prompts: bool
    prompt_weights: bool
    clip_skip: int | None
    guidance_rescale: float
    image: Source | Latents | None
    strength: float | None
    variation_seed: int | None
    variation_strength: float
    mask: Source | None
    denoising_start: float | None
    denoising_end: float | None
    original_size: tuple[int, int] | None
    crops_coords_top_left: tuple[int, int] | None
    target_size: tuple[int, int] | None
    aesthetic_score: float | None
    negative_original_size: tuple[int, int] | None
    negative_crops_coords_top_left: tuple[int, int] | None
    negative_target_size: tuple[int, int] | None
    negative_aesthetic_score: float | None
    output_type: OutputType
    prior_num_inference_steps: int | None
    prior_guidance_scale: float | None
    prior_image: Source | None
    prior_strength: float | None
    prior_negative_prompt: str | None
    mix: Mix | None
    hint: Source | None
    sampling: Sampling | Mapping[str, Any] | None
    cache_interval: int


@dataclass(frozen=True)
class Request:
    """What a user asks for; None takes the bundle's default, a seed of None a random one of 32 bits.

    `negative_prompt` is what to stay away from; None is nothing, for which some models were trained with
    zeros and others with an empty text. `prompt_2` and `negative_prompt_2` are for a second text encoder;
    None is as for the first.
    `long_prompts` keeps what does not fit into one text encoder input, in further chunks; `prompt_weights`
    reads `(word:1.3)` and the like as weights (see `allaprima.runtime.prompts`).
    `clip_skip` leaves out the last layers of the text encoder for the prompt, as in diffusers: 1 takes the
    penultimate layer's states, None or 0 all layers. `guidance_rescale`, between 0 and 1, brings the contrast
    that guidance adds back towards that of the prompt alone (arXiv 2305.08891, section 3.4).
    `image` is a picture to begin with; without `height` and `width` its own size is taken, rounded down to
    what the model paints. `strength`, from 0 to 1, says how much of it is painted over: None is 0.8, and 0.3
    for Kandinsky. It may also be latents [N,C,H,W] as another request with the `output_type` "latent" has
    them.
    `mask`, a picture of the same size, says where: white is painted over (with a strength of 1 if none is
    given), black stays.
    `variation_strength`, from 0 to 1, turns the first noise of `seed` towards that of `variation_seed` (None
    is random): pictures that resemble each other.
    `denoising_end`, between 0 and 1, stops after this share of the noise schedule, and `denoising_start` goes
    on from there with latents: a base model and its refiner. Both count the steps of the whole.
    `original_size` to `negative_aesthetic_score`: see `MicroConditioning`.
    `prior_num_inference_steps` and `prior_guidance_scale` are for the prior of a model that has one. It may
    begin with `prior_image`, whose embedding it makes anew by `prior_strength`, from 0 to 1 (None is 0.3).
    `mix` is in place of the prompt, which is "": texts and pictures with their weights, as
    `[("a cat", 0.3), (Path("cat.png"), 0.7)]`, whose embeddings are summed up. A str is always a text. Then
    `negative_prompt` is the denoiser's alone, and `prior_negative_prompt` the prior's.
    `hint` is a picture of depths, bright where it is near, for a model that paints after one.
    `sampling` says more of the sampler (see `Sampling`): custom timesteps or sigmas, which say the number of
    steps, churn, order, and options of the scheduler.
    `cache_interval` above 1 computes the deep part of the denoiser at every so many calls only, which is
    faster and not the same picture; the bundle must have been exported with --step-cache.
    """

    prompt: str
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    num_images: int = 1
    eta: float = 0.0
    long_prompts: bool = False
    prompt_weights: bool = False
    clip_skip: int | None = None
    guidance_rescale: float = 0.0
    image: Source | Latents | None = None
    strength: float | None = None
    variation_seed: int | None = None
    variation_strength: float = 0.0
    mask: Source | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    aesthetic_score: float | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    negative_aesthetic_score: float | None = None
    output_type: OutputType = "pil"
    prior_num_inference_steps: int | None = None
    prior_guidance_scale: float | None = None
    prior_image: Source | None = None
    prior_strength: float | None = None
    prior_negative_prompt: str | None = None
    mix: Mix | None = None
    hint: Source | None = None
    sampling: Sampling | Mapping[str, Any] | None = None
    cache_interval: int = 1

    def check(self, manifest: Manifest) -> Settings:
        """The request with the bundle's defaults filled in.

        Sampler names, and limits that depend on the sampler, are checked by `make_table`.

        Raises RequestError naming the value and what to do.
        """
        defaults = manifest.defaults
        picture, latents = self._read_image(manifest)
        height, width = self._size(manifest, picture, latents)
        guidance = self.guidance_scale
        sampler = None if self.sampler is None else fields.text("sampler", self.sampler)
        sampling = Sampling.read(self.sampling)
        count = fields.whole("num_images", self.num_images, 1)
        _check_count(latents, count)
        _check_pixels(count, height, width)
        settings = Settings(
            **_texts(self, manifest),  # type: ignore[arg-type]
            num_inference_steps=self._steps(manifest, sampler, sampling),
            guidance_scale=fields.finite(
                "guidance_scale", defaults.guidance_scale if guidance is None else guidance
            ),
            sampler=sampler,
            seed=fields.seed("seed", self.seed, count),
            height=height,
            width=width,
            num_images=count,
            eta=fields.eta(self.eta),
            long_prompts=fields.flag("long_prompts", self.long_prompts),
            prompt_weights=fields.flag("prompt_weights", self.prompt_weights),
            clip_skip=fields.whole("clip_skip", 0 if self.clip_skip is None else self.clip_skip, 0),
            guidance_rescale=fields.share("guidance_rescale", self.guidance_rescale),
            strength=self._strength(manifest),
            picture=picture,
            latents=latents,
            variation_seed=_variation(self.variation_seed, self.variation_strength, count),
            variation_strength=fields.share("variation_strength", self.variation_strength),
            mask=_mask(self.mask, picture),
            denoising_start=fields.part("denoising_start", self.denoising_start),
            denoising_end=fields.part("denoising_end", self.denoising_end),
            micro_conditioning=read_micro_conditioning(self._sizes(), manifest),
            output_type=_output_type(self.output_type),
            guidance_embedded=_takes(manifest, "timestep_cond"),
            prior_num_inference_steps=_maybe(fields.whole, self, "prior_num_inference_steps", 2),
            prior_guidance_scale=_maybe(fields.finite, self, "prior_guidance_scale"),
            prior=read_prior_request(self, manifest),
            hint=read_hint(self.hint, manifest),
            sampling=sampling,
            cache_interval=read_interval(self.cache_interval, manifest),
        )
        settings.check(needs_mask=_takes(manifest, "mask"))
        return settings

    def _steps(self, manifest: Manifest, sampler: str | None, sampling: Sampling) -> int:
        """The number of steps: of a custom schedule, the request, or the bundle."""
        steps, listed, noisy = self.num_inference_steps, sampling.timesteps, sampling.sigmas
        if listed is not None or noisy is not None:
            return count_steps(manifest.scheduler, sampler, steps, timesteps=listed, sigmas=noisy)
        usual = manifest.defaults.num_inference_steps
        return fields.whole("num_inference_steps", usual if steps is None else steps, 1)

    def _read_image(self, manifest: Manifest) -> tuple[Image.Image | None, Latents | None]:
        if isinstance(self.image, np.ndarray) and self.image.dtype != np.uint8:
            return None, read_latents(self.image, manifest.latent)
        return None if self.image is None else read_picture(cast(Source, self.image)), None

    def _size(
        self, manifest: Manifest, picture: Image.Image | None, latents: Latents | None
    ) -> tuple[int, int]:
        """Height and width in pixels."""
        latent, size = manifest.latent, (manifest.defaults.height, manifest.defaults.width)
        if latents is not None:
            size = latents.shape[2] * latent.downscale, latents.shape[3] * latent.downscale
        elif picture is not None and self.height is None and self.width is None:
            size = fitting_size(picture, latent.multiple)
        given = size[0] if self.height is None else self.height, size[1] if self.width is None else self.width
        height, width = (
            fields.side(name, each, latent) for name, each in zip(("height", "width"), given, strict=True)
        )
        if latents is not None and (height, width) != size:
            raise RequestError(
                f"height and width are {height} and {width}, but the latents are those of {size[0]} x "
                f"{size[1]} pixels: leave both out"
            )
        return height, width

    def _strength(self, manifest: Manifest) -> float | None:
        if self.image is None or self.denoising_start is not None:
            if self.strength is not None:
                why = "there is no image to paint over" if self.image is None else "denoising_start says it"
                raise RequestError(f"strength is {self.strength!r}, but {why}: leave it out")
            return None
        usual = conventions_of(manifest).strength if self.mask is None else MASKED_STRENGTH
        return usual if self.strength is None else fields.share("strength", self.strength)

    def _sizes(self) -> dict[str, object]:
        negative = (f"negative_{name}" for name in SIZES)
        return {name: getattr(self, name) for name in (*SIZES, *negative, *SCORES)}


def _maybe(check: Callable[..., Number], request: Request, name: str, *least: int) -> Number | None:
    """A field that is checked if it is given."""
    value = getattr(request, name)
    return None if value is None else check(name, value, *least)


def _takes(manifest: Manifest, condition: str) -> bool:
    return any(spec.name == condition for spec in manifest.components["denoiser"].inputs)


def _texts(request: Request, manifest: Manifest) -> dict[str, str | None]:
    texts: dict[str, str | None] = {"prompt": fields.text("prompt", request.prompt)}
    for name in ("negative_prompt", "prompt_2", "negative_prompt_2"):
        value = getattr(request, name)
        texts[name] = None if value is None else fields.text(name, value)
        if name.endswith("_2") and value is not None and len(manifest.tokenizers) < 2:
            raise RequestError(f"{name} is {value!r}, but this model has one text encoder: leave it out")
    return texts


def _mask(source: Source | None, picture: Image.Image | None) -> Image.Image | None:
    if source is None:
        return None
    if picture is None:
        raise RequestError("there is a mask, but no image to paint over: hand one in")
    return read_mask(source, picture)


def _check_count(latents: Latents | None, count: int) -> None:
    if latents is not None and len(latents) not in (1, count):
        raise RequestError(f"num_images is {count}, but there are latents of {len(latents)}: make them equal")


def _check_pixels(count: int, height: int, width: int) -> None:
    if count * height * width > MOST_PIXELS:
        raise RequestError(
            f"num_images {count} of {width} x {height} pixels is too much at once: at most {MOST_PIXELS} "
            "pixels are painted together, so ask for fewer or smaller pictures"
        )


def _output_type(value: object) -> OutputType:
    if value == "pil" or value == "latent":
        return "pil" if value == "pil" else "latent"
    raise RequestError(f"output_type is {value!r}: it should be 'pil' or 'latent'")


def _variation(seed: int | None, strength: float, count: int) -> int | None:
    """The variation's seed, random if there is a strength; RequestError for a seed without one."""
    if strength:
        return fields.seed("variation_seed", seed, count)
    if seed is not None:
        raise RequestError(f"variation_seed is {seed}, but variation_strength is 0: give one up to 1")
    return None
