"""The fields of OpenAI's Images API, and the orders they make.

What is not known is refused, as OpenAI refuses it: a misspelt extension would go unnoticed otherwise. Fields
of OpenAI that mean nothing here (`quality`, `style`, `moderation`, `user`, ...) are taken and have no effect.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field

from allaprima.bundle import Manifest, RequestError
from allaprima.runtime import Request, samplers
from allaprima.runtime.conventions import conventions_of
from allaprima.runtime.request import MASKED_STRENGTH
from allaprima.serve.encoding import Format
from allaprima.serve.jobs import Order
from allaprima.serve.limits import MOST

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_LONGEST = 10_000
"""Steps beyond which no preview is planned; the limits of the server refuse the order."""


class Painting(BaseModel):
    """What both routes take. Null is as if it were not there."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(description="What to paint.")
    model: str | None = Field(None, description="The name of a model; the server's first if left out.")
    n: Annotated[int, Field(ge=1, le=MOST)] | None = Field(
        None, description="How many pictures, each with its own seed."
    )
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto: the model's own.")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="The quality of JPEG and WebP."
    )
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    background: Literal["opaque", "auto"] | None = Field(None, description="Pictures have no transparency.")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None, description="Has no effect: num_inference_steps says it."
    )
    user: str | None = Field(None, description="Has no effect.")
    safety_identifier: str | None = Field(None, description="Has no effect.")
    moderation: Literal["low", "auto"] | None = Field(None, description="Has no effect.")
    negative_prompt: str | None = Field(None, description="What to stay away from.")
    num_inference_steps: Annotated[int, Field(ge=1, le=MOST)] | None = None
    guidance_scale: float | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = Field(None, description="Of the first picture.")
    sampler: str | None = Field(None, description="See /api/samplers.")
    strength: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="How much of a picture is painted over."
    )
    deadline: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Seconds from now after which nobody needs the pictures any more."
    )

    @property
    def count(self) -> int:
        """Of pictures."""
        return 1 if self.n is None else self.n

    @property
    def format(self) -> Format:
        """Of the files."""
        return self.output_format or "png"

    def check(self) -> None:
        """What single fields do not tell. Raises RequestError."""
        if self.format == "png" and self.output_compression not in (None, 100):
            raise RequestError(
                f"output_compression is {self.output_compression}, but PNG loses nothing: leave it out, or "
                "choose the output_format jpeg or webp"
            )

    def dimensions(self) -> tuple[int | None, int | None]:
        """Height and width; None is the model's, or the picture's. Raises RequestError."""
        if self.size is None or self.size == "auto":
            return None, None
        match = _SIZE.fullmatch(self.size)
        if match is None:
            raise RequestError(
                f"size is {self.size[:100]!r}: write WIDTHxHEIGHT in pixels, as 512x512, or auto"
            )
        return int(match[2]), int(match[1])

    def order(self, manifest: Manifest, image: Image | None = None, mask: Image | None = None) -> Order:
        """For the studio. Raises RequestError."""
        self.check()
        height, width = self.dimensions()
        request = Request(
            self.prompt,
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            sampler=self.sampler,
            seed=self.seed,
            height=height,
            width=width,
            num_images=self.count,
            strength=self.strength,
            image=image,
            mask=mask,
        )
        return Order(request, self.model, self._preview_every(manifest, request), self.deadline)

    def _preview_every(self, manifest: Manifest, request: Request) -> int | None:
        """So many calls of the model apart that `partial_images` of them fall into the run."""
        if not (self.stream and self.partial_images):
            return None
        steps = request.num_inference_steps or manifest.defaults.num_inference_steps
        calls = min(steps, _LONGEST) * (
            1 if request.sampler is None else samplers.find(request.sampler).calls
        )
        if request.image is not None:
            usual = conventions_of(manifest).strength if request.mask is None else MASKED_STRENGTH
            calls = math.ceil(calls * (usual if request.strength is None else request.strength))
        return max(1, calls // (self.partial_images + 1))


class Generation(Painting):
    """The body of /v1/images/generations."""

    style: Literal["vivid", "natural"] | None = Field(None, description="Has no effect.")


class Edit(Painting):
    """The fields of /v1/images/edits but its files."""

    input_fidelity: Literal["high", "low"] | None = Field(
        None, description="Has no effect: strength says it."
    )


class Picture(BaseModel):
    """A picture, with the extension `seed`."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class TokenDetails(BaseModel):
    """See Usage."""

    text_tokens: int = 0
    image_tokens: int = 0


class Usage(BaseModel):
    """Clients expect it. Nothing is charged by tokens here, so all are zero."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()


class Pictures(BaseModel):
    """The answer."""

    created: int
    background: Literal["opaque"] = "opaque"
    output_format: Format
    size: str
    data: list[Picture]
    usage: Usage = Usage()


class ModelCard(BaseModel):
    """A model, as OpenAI lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "allaprima"


class ModelCards(BaseModel):
    """All models, the default one first."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
