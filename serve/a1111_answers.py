"""What clients of AUTOMATIC1111's web UI get to hear."""

from __future__ import annotations

import json
import time
from typing import Any

from pydantic import BaseModel

from allaprima.bundle import VERSION
from allaprima.runtime import Result
from allaprima.runtime.image import describe
from allaprima.runtime.samplers import find
from allaprima.serve.a1111_fields import Img2Img, Txt2Img
from allaprima.serve.jobs import Job


class Painted(BaseModel):
    """The pictures as PNG in base64, the fields of the request, and JSON in a text on what came of them."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class Progress(BaseModel):
    """From 0 to 1, and seconds that are left; `current_image` is a preview as PNG in base64."""

    progress: float
    eta_relative: float
    state: dict[str, Any]
    current_image: str | None = None
    textinfo: str | None = None


def told(fields: Txt2Img) -> dict[str, Any]:
    """The fields of a request as they are told back: without pictures, unless they are asked for."""
    left_out = (
        set() if isinstance(fields, Img2Img) and fields.include_init_images else {"init_images", "mask"}
    )
    return fields.model_dump(exclude=left_out)


def state_of(job: Job | None) -> dict[str, Any]:
    """What `progress` says of a job, or that there is none, in that API's own terms."""
    status = job.status if job else None
    begun = "0" if status is None else time.strftime("%Y%m%d%H%M%S", time.localtime(status.created))
    return {
        "skipped": False,
        "interrupted": job is not None and job.cancelled,
        "stopping_generation": False,
        "job": "" if status is None else status.id,
        "job_count": 0 if status is None else 1,
        "job_timestamp": begun,
        "job_no": 0,
        "sampling_step": 0 if status is None else status.step,
        "sampling_steps": 0 if status is None else status.steps,
    }


def info_of(fields: Txt2Img, result: Result) -> str:
    """What became of a request, as JSON: seeds, and for each picture the text that its file holds too."""
    made, first = result.parameters, result.parameters[0]
    subseeds = [-1 if each.variation_seed is None else each.variation_seed for each in made]
    return json.dumps(
        {
            "prompt": first.prompt,
            "all_prompts": [each.prompt for each in made],
            "negative_prompt": first.negative_prompt or "",
            "all_negative_prompts": [each.negative_prompt or "" for each in made],
            "seed": first.seed,
            "all_seeds": [each.seed for each in made],
            "subseed": subseeds[0],
            "all_subseeds": subseeds,
            "subseed_strength": first.variation_strength,
            "width": first.width,
            "height": first.height,
            "sampler_name": find(first.sampler).title,
            "cfg_scale": first.guidance_scale,
            "steps": first.num_inference_steps,
            "batch_size": fields.batch_size or 1,
            "restore_faces": False,
            "face_restoration_model": None,
            "sd_model_name": first.bundle,
            "sd_model_hash": None,
            "sd_vae_name": None,
            "sd_vae_hash": None,
            "seed_resize_from_w": -1,
            "seed_resize_from_h": -1,
            "denoising_strength": first.strength,
            "extra_generation_params": {},
            "index_of_first_image": 0,
            "infotexts": [describe(each) for each in made],
            "styles": [],
            "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
            "clip_skip": first.clip_skip + 1,
            "is_using_inpainting_conditioning": False,
            "version": f"allaprima {VERSION}",
        }
    )
