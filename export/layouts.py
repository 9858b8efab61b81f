"""The releases of Stable Diffusion that come as single files, and what no tensor tells of them.

The names of the text encoder's tensors tell which release a file is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from allaprima.bundle import ExportError

Weights = Mapping[str, torch.Tensor]
UNET, VAE = "model.diffusion_model.", "first_stage_model."


@dataclass(frozen=True)
class Text:
    """A text encoder: the folder of its part, and the prefix of its tensors.

    `pooled`: its pooled vector is used, and so text_projection. `used`: how many layers are; None is all.
    """

    part: str
    prefix: str
    open_clip: bool = False
    pooled: bool = False
    used: int | None = None

    @property
    def tokenizer(self) -> str:
        """The folder of its tokenizer."""
        return self.part.replace("text_encoder", "tokenizer")

    @property
    def kind(self) -> str:
        """Its class in transformers."""
        return "CLIPTextModelWithProjection" if self.pooled else "CLIPTextModel"

    @property
    def pad(self) -> str:
        """The token that fills up prompts."""
        return "!" if self.open_clip else "<|endoftext|>"


@dataclass(frozen=True)
class Release:
    """What a family of releases has in common and no tensor tells.

    `sign` begins names that no other release has. `heads` 0: 64 channels each. `size` is that of latents.
    `time_ids`: how many numbers besides the text condition the UNet. `index` goes into model_index.json.
    """

    sign: str
    pipeline: str
    inpainting: str
    texts: tuple[Text, ...]
    heads: int
    prediction: str
    size: int
    scaling: float
    scheduler: Mapping[str, Any]
    index: Mapping[str, Any]
    vae: Mapping[str, Any] = field(default_factory=dict)
    time_ids: int = 0


_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, **_SCHEDULE}
_EULER = {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
    "clip_sample": False,
    "skip_prk_steps": True,
    **_SCHEDULE,
}
_UNCHECKED = {"safety_checker": [None, None], "feature_extractor": [None, None]}
_FIRST = Release(
    sign="cond_stage_model.transformer.text_model.",
    pipeline="StableDiffusionPipeline",
    inpainting="StableDiffusionInpaintPipeline",
    texts=(Text("text_encoder", "cond_stage_model."),),
    heads=8,
    prediction="epsilon",
    size=64,
    scaling=0.18215,
    scheduler={"_class_name": "PNDMScheduler", "skip_prk_steps": True, **_SCHEDULE},
    index=_UNCHECKED,
)
_SECOND = Release(
    sign="cond_stage_model.model.",
    pipeline="StableDiffusionPipeline",
    inpainting="StableDiffusionInpaintPipeline",
    # It was trained on the states before the last of 24 layers. Some files have that layer, others do not.
    texts=(Text("text_encoder", "cond_stage_model.", open_clip=True, used=23),),
    heads=0,
    prediction="v_prediction",
    size=96,
    scaling=0.18215,
    scheduler=_DDIM,
    index=_UNCHECKED,
)
_XL = Release(
    sign="conditioner.embedders.1.",
    pipeline="StableDiffusionXLPipeline",
    inpainting="StableDiffusionXLInpaintPipeline",
    texts=(
        Text("text_encoder", "conditioner.embedders.0."),
        Text("text_encoder_2", "conditioner.embedders.1.", open_clip=True, pooled=True),
    ),
    heads=0,
    prediction="epsilon",
    size=128,
    scaling=0.13025,
    scheduler=_EULER,
    index={"force_zeros_for_empty_prompt": True, "add_watermarker": None},
    vae={"force_upcast": True},
    time_ids=6,
)
_REFINER = Release(
    sign="conditioner.embedders.0.model.",
    pipeline="StableDiffusionXLImg2ImgPipeline",
    inpainting="StableDiffusionXLInpaintPipeline",
    texts=(Text("text_encoder_2", "conditioner.embedders.0.", open_clip=True, pooled=True),),
    heads=0,
    prediction="epsilon",
    size=128,
    scaling=0.13025,
    scheduler=_EULER,
    index={
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
        "add_watermarker": None,
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    },
    vae={"force_upcast": True},
    time_ids=5,
)
_RELEASES = (_XL, _REFINER, _FIRST, _SECOND)


def find_release(file: Path, weights: Weights) -> Release:
    """The release that a checkpoint is of.

    Raises:
        ExportError: none that is known, or trained with another noise schedule than its release.
    """
    if f"{UNET}input_blocks.0.0.weight" not in weights:
        raise ExportError(
            f"'{file}' is not a checkpoint of Stable Diffusion 1.x, 2.x or XL: "
            f"it has no {UNET}input_blocks.0.0.weight"
        )
    for name in weights:
        if name.startswith("edm_"):
            raise ExportError(
                f"'{file}' is of the EDM kind (it has {name}), whose noise schedule is not supported"
            )
    for release in _RELEASES:
        if any(name.startswith(release.sign) for name in weights):
            return release
    signs = ", ".join(f"{release.sign}*" for release in _RELEASES)
    raise ExportError(
        f"'{file}' has no text encoder that is known here ({signs}): it is incomplete, or of another family"
    )


def read_scheduler(release: Release, weights: Weights, prediction: str | None) -> dict[str, Any]:
    """The scheduler's configuration; `prediction` None is the file's, which empty tensors may tell.

    `v_pred` stands for v prediction, and `ztsnr` for a schedule that ends in noise alone, from which only v
    prediction can start.
    """
    chosen = prediction or ("v_prediction" if "v_pred" in weights else release.prediction)
    if "ztsnr" not in weights or chosen != "v_prediction":
        return {**release.scheduler, "prediction_type": chosen}
    able = _DDIM if release.scheduler["_class_name"] == "PNDMScheduler" else release.scheduler
    terminal = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {**able, **terminal, "prediction_type": chosen}


def read_index(release: Release, unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """What model_index.json holds. A UNet that also takes a mask and a masked picture is for inpainting."""
    masked = unet["in_channels"] == 2 * unet["out_channels"] + 1
    models = {text.part: ["transformers", text.kind] for text in release.texts}
    tokenizers = {text.tokenizer: ["transformers", "CLIPTokenizer"] for text in release.texts}
    return {
        "_class_name": release.inpainting if masked else release.pipeline,
        **release.index,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        **models,
        **tokenizers,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
