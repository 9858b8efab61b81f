"""The fields of our own jobs over HTTP."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any, Literal

from PIL.Image import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from allaprima.bundle import Manifest
from allaprima.runtime import Request
from allaprima.serve.failures import failure_of
from allaprima.serve.jobs import Job, Order, Status
from allaprima.serve.limits import MOST, Limits

PICTURES = ("image", "mask", "hint", "prior_image")
"""The fields that are pictures."""
_MOST_STEPS = 1000

State = Literal["queued", "running", "done", "failed", "cancelled"]


def _parsed(value: object) -> object:
    """What is no text in JSON but has to be one in a form."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _paired(value: object) -> object:
    value = _parsed(value)
    return tuple(value) if isinstance(value, list) else value


Whole = Annotated[int, Field(ge=-MOST, le=MOST)]
Pair = Annotated[tuple[Whole, Whole], BeforeValidator(_paired)]
Base64 = Annotated[
    str | None, Field(description="A PNG, JPEG or WebP file in base64, plain or as a data URL.")
]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]


class SamplingFields(BaseModel):
    """Options of the sampler. Those of the scheduler's training are the bundle's alone."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    timesteps: Annotated[list[float], Field(max_length=_MOST_STEPS)] | None = None
    sigmas: Annotated[list[float], Field(max_length=_MOST_STEPS)] | None = None
    order: Whole | None = None
    s_churn: float | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float | None = None


class FormFields(BaseModel):
    """What a job asks for, but its pictures; null takes the bundle's default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str
    model: str | None = Field(None, description="The name of a model; the server's first if left out.")
    preview_every: Annotated[int, Field(ge=0, le=MOST)] | None = Field(
        None, description="Previews after so many calls of the model."
    )
    deadline: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Seconds from now after which nobody needs the pictures any more."
    )
    negative_prompt: str | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=MOST)] | None = None
    guidance_scale: float | None = None
    sampler: str | None = Field(None, description="See /api/samplers.")
    seed: Seed | None = Field(None, description="Of the first picture; the next ones have the next seeds.")
    height: Annotated[int, Field(ge=1, le=MOST)] | None = None
    width: Annotated[int, Field(ge=1, le=MOST)] | None = None
    num_images: Annotated[int, Field(ge=1, le=MOST)] = 1
    eta: Share = 0.0
    long_prompts: bool = False
    prompt_weights: bool = False
    clip_skip: Annotated[int, Field(ge=0, le=MOST)] | None = None
    guidance_rescale: Share = 0.0
    strength: Share | None = None
    variation_seed: Seed | None = None
    variation_strength: Share = 0.0
    original_size: Pair | None = None
    crops_coords_top_left: Pair | None = None
    target_size: Pair | None = None
    aesthetic_score: float | None = None
    negative_original_size: Pair | None = None
    negative_crops_coords_top_left: Pair | None = None
    negative_target_size: Pair | None = None
    negative_aesthetic_score: float | None = None
    prior_num_inference_steps: Annotated[int, Field(ge=1, le=MOST)] | None = None
    prior_guidance_scale: float | None = None
    prior_strength: Share | None = None
    sampling: Annotated[SamplingFields, BeforeValidator(_parsed)] | None = None
    cache_interval: Annotated[int, Field(ge=1, le=MOST)] = 1

    def order(self, pictures: dict[str, Image]) -> Order:
        """For the studio."""
        given: dict[str, Any] = self.model_dump(
            exclude={"model", "preview_every", "deadline", "sampling", *PICTURES}, exclude_none=True
        )
        if self.sampling is not None:
            given["sampling"] = self.sampling.model_dump(exclude_none=True)
        return Order(Request(**given | pictures), self.model, self.preview_every or None, self.deadline)


class JobFields(FormFields):
    """What a job asks for, with its pictures in base64."""

    image: Base64 = None
    mask: Base64 = None
    hint: Base64 = None
    prior_image: Base64 = None


class JobStatus(BaseModel):
    """A job at one moment.

    `parameters`, `warnings` and `flagged` are those of its pictures, once it is done.
    """

    id: str
    model: str
    state: State
    images: int
    position: int | None
    step: int
    steps: int
    progress: float
    created: float
    started: float | None
    ended: float | None
    error: str | None
    prompt: str
    parameters: list[dict[str, Any]] | None = None
    warnings: list[str] | None = None
    flagged: list[bool] | None = None

    @classmethod
    def of(cls, job: Job, status: Status | None = None) -> JobStatus:
        """Of a job as it is now, or as it was at some event."""
        status = job.status if status is None else status
        known: dict[str, Any] = asdict(status) | {"progress": status.progress, "error": _error(job, status)}
        if status.state == "done" and job.result is not None:
            result = job.result
            known["parameters"] = [asdict(each) for each in result.parameters]
            known["warnings"] = list(result.warnings)
            known["flagged"] = None if result.flagged is None else list(result.flagged)
        return cls(**known, prompt=job.order.request.prompt)


def _error(job: Job, status: Status) -> str | None:
    """What the client may know of it."""
    return None if status.error is None or job.failure is None else failure_of(job.failure).message


class JobList(BaseModel):
    """The sender's own jobs that wait or run, the oldest first; and how many those of all are."""

    jobs: list[JobStatus]
    queued: int
    running: int


class Most(BaseModel):
    """What one request may ask for: pictures, steps, pixels of a picture, and the product of all three."""

    num_images: int
    num_inference_steps: int
    pixels: int
    work: int

    @classmethod
    def of(cls, limits: Limits) -> Most:
        """Of a server."""
        return cls(
            num_images=limits.images,
            num_inference_steps=limits.steps,
            pixels=limits.pixels,
            work=limits.work,
        )


class ModelInfo(BaseModel):
    """A model. Sides are multiples of `multiple` pixels; `takes` are the pictures that it can begin with."""

    name: str
    family: str
    precision: str
    default: bool
    loaded: bool
    multiple: int
    previews: bool
    takes: list[str]
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    most: Most

    @classmethod
    def of(cls, manifest: Manifest, limits: Limits, *, name: str, default: bool, loaded: bool) -> ModelInfo:
        """Of a bundle that is served."""
        parts, usual = manifest.components, manifest.defaults
        takes = {
            "vae_encoder": ("image", "mask"),
            "hint_encoder": ("hint",),
            "image_encoder": ("prior_image",),
        }
        return cls(
            name=name,
            family=manifest.family,
            precision=manifest.precision,
            default=default,
            loaded=loaded,
            multiple=manifest.latent.multiple,
            previews=manifest.preview is not None,
            takes=[each for part, pictures in takes.items() if part in parts for each in pictures],
            height=usual.height,
            width=usual.width,
            num_inference_steps=usual.num_inference_steps,
            guidance_scale=usual.guidance_scale,
            most=Most.of(limits),
        )


class SamplerCard(BaseModel):
    """A sampler, as `allaprima samplers` tells it."""

    name: str
    title: str
    aliases: list[str]
    description: str
    calls: int
    noise: str
    history: int
    arguments: list[str]
