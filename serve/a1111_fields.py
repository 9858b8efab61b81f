"""What clients of AUTOMATIC1111's web UI send, as requests of our own.

That API ignores fields that it does not know, and so does this. What it knows and we do not is refused where
it would have changed the picture.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from PIL import Image, ImageFilter, ImageOps
from pydantic import BaseModel, ConfigDict, Field

from allaprima.bundle import Manifest, RequestError
from allaprima.runtime import Request
from allaprima.runtime.samplers import SamplerInfo, find
from allaprima.runtime.samplers.catalog import RULES
from allaprima.serve.limits import MOST
from allaprima.serve.uploads import decode_base64, read_alpha_mask, read_upload

USUAL_RULES = {
    "dpm2": "karras",
    "dpm2_a": "karras",
    "dpmpp_2m": "karras",
    "dpmpp_sde": "karras",
    "dpmpp_2m_sde": "exponential",
    "dpmpp_3m_sde": "exponential",
}
"""How that web UI spaces the sigmas of a sampler if nobody says how; those of the others stay as they are."""
_AUTOMATIC = ("", "automatic")
_PLAIN = ("uniform", "normal")
_SUFFIXES = (".safetensors", ".ckpt")
_ALL_LAYERS = 1
"""Their clip skip counts from one."""
_CROP, _FILL = 1, 2
"""Resize modes; 0 and 3 stretch."""


Whole = Annotated[int, Field(ge=-MOST, le=MOST)]


class Txt2Img(BaseModel):
    """The fields of `/sdapi/v1/txt2img`; what is left out is the model's usual value."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    prompt: str = ""
    negative_prompt: str | None = None
    steps: Whole | None = None
    cfg_scale: float | None = None
    width: Whole | None = None
    height: Whole | None = None
    seed: int | None = -1
    subseed: int | None = -1
    subseed_strength: float | None = 0.0
    sampler_name: str | None = None
    sampler_index: str | None = Field(None, description="The same as sampler_name, which counts more.")
    scheduler: str | None = None
    batch_size: Whole | None = 1
    n_iter: Whole | None = 1
    eta: float | None = None
    override_settings: dict[str, Any] | None = None
    send_images: bool = True
    enable_hr: bool | None = False
    tiling: bool | None = False
    restore_faces: bool | None = False
    script_name: str | None = None
    alwayson_scripts: dict[str, Any] | None = None


class Img2Img(Txt2Img):
    """The fields of `/sdapi/v1/img2img`, pictures in base64. In `mask`, white is painted over."""

    init_images: list[str] = Field(min_length=1, max_length=1)
    denoising_strength: float | None = 0.75
    resize_mode: Whole | None = 0
    mask: str | None = None
    mask_blur: float | None = Field(0, ge=0, le=256, description="In pixels of `init_images`.")
    inpainting_mask_invert: Whole | None = 0
    include_init_images: bool = False


def model_of(name: str) -> str:
    """The name of a model as it is listed, of what a client makes of it ("shapes.safetensors [1a2b3c]")."""
    plain = name.partition(" [")[0].strip()
    for suffix in _SUFFIXES:
        plain = plain.removesuffix(suffix)
    return plain


def chosen_model(fields: Txt2Img) -> str | None:
    """The model that a request names for itself. Raises RequestError if it is not a text."""
    name = (fields.override_settings or {}).get("sd_model_checkpoint")
    if name is None or name == "":
        return None
    if not isinstance(name, str):
        raise RequestError(f"override_settings.sd_model_checkpoint is {name!r}: it should be a text")
    return model_of(name)


def sampler_of(name: str | None, scheduler: str | None) -> SamplerInfo | None:
    """The sampler of a name ("DPM++ 2M", or with a rule for the sigmas, "DPM++ 2M Karras") and a scheduler.

    None is the model's own. Raises RequestError for what there is not.
    """
    if not name:
        return None
    info, rule = find(name), (scheduler or "").strip().lower()
    if info.name.endswith(RULES):
        return info
    if rule in _AUTOMATIC:
        rule = USUAL_RULES.get(info.name, "")
    elif rule not in _PLAIN and rule not in RULES:
        there_are = ", ".join(["Automatic", "Uniform", *(each.title() for each in RULES)])
        raise RequestError(f"there is no scheduler {scheduler!r}: the schedulers are {there_are}")
    return find(f"{info.name} {rule}") if rule in RULES else info


def read_request(fields: Txt2Img, manifest: Manifest, most: int) -> Request:
    """The request for a model; pictures have at most `most` pixels. Raises RequestError."""
    _check_known(fields)
    sampler = sampler_of(fields.sampler_name or fields.sampler_index, fields.scheduler)
    weighted = not manifest.family.startswith("kandinsky")  # whose text encoders know neither
    varied = fields.subseed_strength or 0.0
    request = Request(
        fields.prompt,
        negative_prompt=fields.negative_prompt or None,
        num_inference_steps=fields.steps,
        guidance_scale=fields.cfg_scale,
        sampler=sampler.name if sampler else None,
        seed=_seed(fields.seed),
        height=fields.height,
        width=fields.width,
        num_images=_count("batch_size", fields.batch_size) * _count("n_iter", fields.n_iter),
        eta=(fields.eta or 0.0) if sampler and "eta" in sampler.arguments else 0.0,
        long_prompts=weighted,
        prompt_weights=weighted,
        clip_skip=_clip_skip(fields),
        variation_seed=_seed(fields.subseed) if varied else None,
        variation_strength=varied,
    )
    return _with_picture(request, fields, most) if isinstance(fields, Img2Img) else request


def _with_picture(request: Request, fields: Img2Img, most: int) -> Request:
    image = read_upload(decode_base64(fields.init_images[0], "init_images"), "init_images", most)
    mask = None
    if fields.mask:
        mask = _read_mask(decode_base64(fields.mask, "mask"), most).resize(image.size)
        if fields.inpainting_mask_invert:
            mask = ImageOps.invert(mask)
        if fields.mask_blur:
            mask = mask.filter(ImageFilter.GaussianBlur(fields.mask_blur))
    if request.width and request.height:
        size = (request.width, request.height)
        image = _framed("init_images", image, size, fields.resize_mode)
        mask = None if mask is None else _framed("mask", mask, size, fields.resize_mode)
    return replace(request, image=image, mask=mask, strength=fields.denoising_strength)


def _read_mask(data: bytes, most: int) -> Image.Image:
    """In shades of gray; of a picture that is transparent somewhere, what is not: as drawn on a layer."""
    picture = read_upload(data, "mask", most).convert("L")
    try:
        drawn = ImageOps.invert(read_alpha_mask(data, "mask", most))
    except RequestError:  # nothing is transparent
        return picture
    return drawn if drawn.getextrema() != (255, 255) else picture


def _framed(name: str, image: Image.Image, size: tuple[int, int], mode: int | None) -> Image.Image:
    """In the shape of what is painted; sizes that no model paints are left to the checks that follow."""
    if mode == _CROP and min(size) > 0 and image.width * size[1] != image.height * size[0]:
        scale = min(image.width / size[0], image.height / size[1])
        cut = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        return ImageOps.fit(image, cut)
    if mode == _FILL and image.width * size[1] != image.height * size[0]:
        raise RequestError(
            f"resize_mode is {mode}, but {name} is not filled up here: use 0 to stretch it or 1 to crop it"
        )
    return image


def _check_known(fields: Txt2Img) -> None:
    """RequestError for what would have changed the picture, had we known it."""
    scripts = [*(fields.alwayson_scripts or {}), *([fields.script_name] if fields.script_name else [])]
    if scripts:
        raise RequestError(f"there is no script {scripts[0]!r}: this server has none")
    for name in ("enable_hr", "tiling", "restore_faces"):
        if getattr(fields, name):
            raise RequestError(f"{name} is true, but this server cannot do that: leave it out")


def _seed(seed: int | None) -> int | None:
    return None if seed is None or seed < 0 else seed


def _count(name: str, count: int | None) -> int:
    count = 1 if count is None else count
    if count < 1:
        raise RequestError(f"{name} is {count}: it should be at least 1")
    return count


def _clip_skip(fields: Txt2Img) -> int | None:
    layers = (fields.override_settings or {}).get("CLIP_stop_at_last_layers")
    if layers is None:
        return None
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < _ALL_LAYERS:
        raise RequestError(
            f"override_settings.CLIP_stop_at_last_layers is {layers!r}: it should be 1, for all layers, or "
            "more"
        )
    return layers - _ALL_LAYERS
