"""What a request asks of a prior beyond its prompt: a mix of texts and pictures, or a picture to begin."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from allaprima.bundle import Manifest, RequestError
from allaprima.runtime import fields
from allaprima.runtime.pictures import Source, read_picture
from allaprima.runtime.prior import COMPONENT as PRIOR
from allaprima.runtime.vision import COMPONENT as IMAGE_ENCODER

Mix = Sequence[tuple[Source, float]]
"""Texts (a str is always one) and pictures, each with its weight."""
STRENGTH = 0.3
"""How much of a picture's embedding the prior makes anew if a request does not say, as in diffusers."""
FIELDS = ("mix", "prior_image", "prior_strength", "prior_negative_prompt")


@dataclass(frozen=True)
class PriorRequest:
    """What a request asks of a prior beyond its prompt, checked.

    `mix` is in place of the prompt: texts and pictures, whose embeddings are summed with their weights.
    `picture` is what the prior begins with, `strength` how much of its embedding it makes anew, else None.
    `negative_prompt` is what the prior stays away from in a mix.
    """

    mix: tuple[tuple[str | Image.Image, float], ...] = ()
    picture: Image.Image | None = None
    strength: float | None = None
    negative_prompt: str | None = None

    def describe(self) -> dict[str, Any]:
        """Fields of Parameters; a picture in a mix is None."""
        mix = tuple((item if isinstance(item, str) else None, weight) for item, weight in self.mix)
        return {
            "mix": mix or None,
            "prior_strength": self.strength,
            "prior_negative_prompt": self.negative_prompt,
        }


class Asked(Protocol):
    """The fields of a Request that count here."""

    @property
    def prompt(self) -> str: ...
    @property
    def mix(self) -> Mix | None: ...
    @property
    def prior_image(self) -> Source | None: ...
    @property
    def prior_strength(self) -> float | None: ...
    @property
    def prior_negative_prompt(self) -> str | None: ...


def read_prior_request(request: Asked, manifest: Manifest) -> PriorRequest:
    """Check what a request asks of the prior.

    Raises RequestError: fields that are wrong or contradict one another, pictures that cannot be read, a
    model without a prior, or pictures for a bundle without image encoder.
    """
    given = [name for name in FIELDS if getattr(request, name) is not None]
    if given and PRIOR not in manifest.components:
        raise RequestError(f"there is a {given[0]}, but this model has no prior: leave it out")
    mix = () if request.mix is None else _read_mix(request.mix)
    if mix and request.prompt:
        raise RequestError(
            f"there is a mix, and a prompt {request.prompt!r} beside it: make it one of the mix's texts, and "
            'the prompt ""'
        )
    if mix and request.prior_image is not None:
        raise RequestError("there are a mix and a prior_image: hand in one of them")
    if request.prior_strength is not None and request.prior_image is None:
        raise RequestError(
            f"prior_strength is {request.prior_strength!r}, but there is no prior_image to begin with: leave "
            "it out"
        )
    if request.prior_negative_prompt is not None and not mix:
        raise RequestError(
            f"prior_negative_prompt is {request.prior_negative_prompt!r}, but it is for a mix: without one, "
            "negative_prompt is the prior's too"
        )
    picture = None if request.prior_image is None else read_picture(request.prior_image, "prior_image")
    if IMAGE_ENCODER not in manifest.components and (
        picture is not None or any(isinstance(item, Image.Image) for item, _ in mix)
    ):
        raise RequestError(
            f"the bundle has no image encoder, which {'a picture in a mix' if mix else 'prior_image'} needs: "
            "export the checkpoint again with --image-encoder"
        )
    strength, negative = request.prior_strength, request.prior_negative_prompt
    return PriorRequest(
        mix,
        picture,
        None
        if picture is None
        else fields.share("prior_strength", STRENGTH if strength is None else strength),
        None if negative is None else fields.text("prior_negative_prompt", negative),
    )


def _read_mix(mix: object) -> tuple[tuple[str | Image.Image, float], ...]:
    if not isinstance(mix, (list, tuple)) or not mix:
        raise RequestError(
            f"mix is {reprlib.repr(mix)}: it should be a list of one or more pairs of a text or "
            'picture and its weight, as [("a cat", 0.3), (picture, 0.7)]'
        )
    return tuple(_read_item(item, number) for number, item in enumerate(mix, start=1))


def _read_item(item: object, number: int) -> tuple[str | Image.Image, float]:
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        raise RequestError(
            f"item {number} of the mix is {reprlib.repr(item)}: it should be a pair of a text or picture "
            "and its weight"
        )
    what, weight = item
    weight = fields.finite(f"the weight of item {number} of the mix", weight)
    return what if isinstance(what, str) else read_picture(what, f"item {number} of the mix"), weight
