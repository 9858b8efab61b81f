"""What a user asks for, checked at the door."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from PIL import Image

from allaprima.bundle import Latent, Manifest, RequestError
from allaprima.runtime.inpainting import read_mask
from allaprima.runtime.pictures import Source, fitting_size, read_picture
from allaprima.runtime.samplers import count_steps
from allaprima.runtime.sampling import Sampling

STRENGTH = 0.8
"""How much of a picture is painted over if a request does not say."""
MASKED_STRENGTH = 1.0
"""The same for the part of it that a mask shows."""


@dataclass(frozen=True)
class Settings:
    """A request with everything resolved but the sampler: None is the bundle's own.

    `height` and `width` in pixels. Image i uses `seed + i`; if there is a variation, all use `seed`, and
    image i `variation_seed + i`. `picture` is what to begin with, `strength` None
    if there is none.
    """

    prompt: str
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float
    sampler: str | None
    seed: int
    height: int
    width: int
    num_images: int
    eta: float
    long_prompts: bool = False
    prompt_weights: bool = False
    clip_skip: int = 0
    guidance_rescale: float = 0.0
    strength: float | None = None
    picture: Image.Image | None = None
    variation_seed: int | None = None
    variation_strength: float = 0.0
    mask: Image.Image | None = None
    sampling: Sampling = field(default_factory=Sampling)

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
        return 2 if self.guidance_scale > 1 else 1


@dataclass(frozen=True)
class Request:
    """What a user asks for; None takes the bundle's default, a seed of None a random one of 32 bits.

    `long_prompts` keeps what does not fit into one text encoder input, in further chunks; `prompt_weights`
    reads `(word:1.3)` and the like as weights (see `allaprima.runtime.prompts`).
    `clip_skip` leaves out the last layers of the text encoder for the prompt, as in diffusers: 1 takes the
    penultimate layer's states, None or 0 all layers. `guidance_rescale`, between 0 and 1, brings the contrast
    that guidance adds back towards that of the prompt alone (arXiv 2305.08891, section 3.4).
    `image` is a picture to begin with; without `height` and `width` its own size is taken, rounded down to
    what the model paints. `strength`, from 0 to 1, says how much of it is painted over: None is 0.8.
    `mask`, a picture of the same size, says where: white is painted over (with a strength of 1 if none is
    given), black stays.
    `variation_strength`, from 0 to 1, turns the first noise of `seed` towards that of `variation_seed` (None
    is random): pictures that resemble each other.
    `sampling` says more of the sampler (see Sampling); custom timesteps or sigmas say the number of steps.
    """

    prompt: str
    negative_prompt: str = ""
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
    image: Source | None = None
    strength: float | None = None
    variation_seed: int | None = None
    variation_strength: float = 0.0
    mask: Source | None = None
    sampling: Sampling | Mapping[str, Any] | None = None

    def check(self, manifest: Manifest) -> Settings:
        """The request with the bundle's defaults filled in.

        Sampler names, and limits that depend on the sampler, are checked by `make_table`.

        Raises RequestError naming the value and what to do.
        """
        defaults = manifest.defaults
        height, width = defaults.height, defaults.width
        picture = None if self.image is None else read_picture(self.image)
        if picture is not None and self.height is None and self.width is None:
            height, width = fitting_size(picture, manifest.latent.multiple)
        guidance = self.guidance_scale
        sampler = None if self.sampler is None else _text("sampler", self.sampler)
        sampling = Sampling.read(self.sampling)
        count = _whole("num_images", self.num_images, 1)
        settings = Settings(
            prompt=_text("prompt", self.prompt),
            negative_prompt=_text("negative_prompt", self.negative_prompt),
            num_inference_steps=self._steps(manifest, sampler, sampling),
            guidance_scale=_finite(
                "guidance_scale", defaults.guidance_scale if guidance is None else guidance
            ),
            sampler=sampler,
            seed=_seed(self.seed, count),
            height=_side("height", height if self.height is None else self.height, manifest.latent),
            width=_side("width", width if self.width is None else self.width, manifest.latent),
            num_images=count,
            eta=_eta(self.eta),
            long_prompts=_flag("long_prompts", self.long_prompts),
            prompt_weights=_flag("prompt_weights", self.prompt_weights),
            clip_skip=_whole("clip_skip", 0 if self.clip_skip is None else self.clip_skip, 0),
            guidance_rescale=_share("guidance_rescale", self.guidance_rescale),
            strength=_strength(self.strength, picture, masked=self.mask is not None),
            picture=picture,
            variation_seed=_variation(self.variation_seed, self.variation_strength, count),
            variation_strength=_share("variation_strength", self.variation_strength),
            mask=_mask(self.mask, picture),
            sampling=sampling,
        )
        if settings.begin == settings.num_inference_steps:
            raise RequestError(
                f"strength {settings.strength} of {settings.num_inference_steps} steps is no step at all: "
                f"raise it to {1 / settings.num_inference_steps:.3g} or more, or take more steps"
            )
        return settings

    def _steps(self, manifest: Manifest, sampler: str | None, sampling: Sampling) -> int:
        """The number of steps: of a custom schedule, the request, or the bundle."""
        steps = self.num_inference_steps
        custom = {"timesteps": sampling.timesteps, "sigmas": sampling.sigmas}
        if any(schedule is not None for schedule in custom.values()):
            return count_steps(manifest.scheduler, sampler, steps, **custom)
        usual = manifest.defaults.num_inference_steps
        return _whole("num_inference_steps", usual if steps is None else steps, 1)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} is {value!r}: it should be a text")
    return value


def _mask(source: Source | None, picture: Image.Image | None) -> Image.Image | None:
    if source is None:
        return None
    if picture is None:
        raise RequestError("there is a mask, but no image to paint over: hand one in")
    return read_mask(source, picture)


def _strength(value: object, picture: Image.Image | None, *, masked: bool) -> float | None:
    if picture is None:
        if value is not None:
            raise RequestError(f"strength is {value!r}, but there is no image to paint over: hand one in")
        return None
    usual = MASKED_STRENGTH if masked else STRENGTH
    return usual if value is None else _share("strength", value)


def _variation(seed: int | None, strength: float, count: int) -> int | None:
    """The variation's seed, random if there is a strength; RequestError for a seed without one."""
    if strength:
        return _seed(seed, count, "variation_seed")
    if seed is not None:
        raise RequestError(f"variation_seed is {seed}, but variation_strength is 0: give one up to 1")
    return None


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}: it should be True or False")
    return value


def _whole(name: str, value: object, least: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}: it should be a whole number")
    if value < least:
        raise RequestError(f"{name} is {value}: it should be at least {least}")
    return int(value)


def _finite(name: str, value: object) -> float:
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            number = float(value)
            if abs(number) < 3e38:  # the graph computes in float32: beyond its range is infinite to it
                return number
    raise RequestError(f"{name} is {value!r}: it should be a finite number")


def _eta(value: object) -> float:
    eta = _finite("eta", value)
    if not 0 <= eta <= 1:
        raise RequestError(f"eta is {eta}: it should lie between 0 (no noise, DDIM) and 1 (DDPM)")
    return eta


def _share(name: str, value: object) -> float:
    share = _finite(name, value)
    if not 0 <= share <= 1:
        raise RequestError(f"{name} is {share}: it should lie between 0 (off) and 1")
    return share


def _seed(value: int | None, count: int, name: str = "seed") -> int:
    seed = secrets.randbits(32) if value is None else _whole(name, value, 0)
    if seed + count > 2**64:
        raise RequestError(f"{name} {seed} is too large for {count} images: seeds end at 2**64 - 1")
    return seed


def _side(name: str, value: object, latent: Latent) -> int:
    side = _whole(name, value, 1)
    multiple = latent.multiple
    below = side // multiple * multiple
    if below == side:
        return side
    nearest = f"{below} and {below + multiple}" if below else f"{multiple}"
    sizes = "sizes are" if below else "size is"
    raise RequestError(f"{name} {side} is not a multiple of {multiple}: the nearest valid {sizes} {nearest}")
