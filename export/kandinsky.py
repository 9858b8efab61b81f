"""Kandinsky 2.2: a prior from text to the embedding of a picture, and a decoder from there to pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from allaprima.bundle import ExportError, Latent, TensorSpec
from allaprima.export import hint, vision
from allaprima.export.configuration import levels, read_defaults, read_scheduler, read_tokenizer, whole
from allaprima.export.encoders import ImageDecoder, QuantizedEncoder
from allaprima.export.family import Family, TextModel
from allaprima.export.graph import GraphPlan
from allaprima.export.source import Checkpoint
from allaprima.export.step import Shape, plan_step
from allaprima.export.unclip import ImageDenoiser, PriorDenoiser
from allaprima.export.update import THRESHOLDING, VARIANCE
from allaprima.export.weights import open_weights

_TASKS = ("", "Img2Img", "Inpaint")
_DEPTH = ("Controlnet", "ControlnetImg2Img")
DECODERS = tuple(f"KandinskyV22{task}Pipeline" for task in (*_TASKS, *_DEPTH))
COMBINED = tuple(f"KandinskyV22{task}CombinedPipeline" for task in _TASKS)
PRIORS = ("KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline")
STEPS, GUIDANCE = 100, 4.0
PRIOR_STEPS, PRIOR_GUIDANCE = 25, 4.0
"""What diffusers' pipelines take if nobody says."""


@dataclass(frozen=True)
class Kandinsky(Family):
    """A decoder's checkpoint with its prior's.

    `prior_scheduler` is that of the embedding's steps, `embedding` D, the width of what a picture is to CLIP.
    `image_encoder`: the bundle gets CLIP's image encoder too.
    """

    prior: Checkpoint | None = None
    prior_scheduler: Mapping[str, Any] | None = None
    embedding: int = 0
    image_encoder: bool = False

    name: ClassVar[str] = "kandinsky-2.2"

    def plans(self, dtype: torch.dtype) -> Mapping[str, Callable[[], GraphPlan]]:
        """As of Family, with the prior after the text encoder, and the encoders of pictures and hints."""
        (text, encode), *rest = super().plans(dtype).items()
        plans: dict[str, Callable[[], GraphPlan]] = {text: encode, "prior": lambda: self._prior(dtype)}
        if self.image_encoder:
            plans[vision.PART] = lambda: vision.plan(self._prior_checkpoint, dtype)
        if hint.EMBEDS in self.conditions:
            plans[hint.PART] = lambda: hint.plan(self.checkpoint.load("unet", dtype))
        return plans | dict(rest)

    def write_files(self, folder: Path) -> None:
        """As of Family, and the prior's settings with the embedding of nothing."""
        super().write_files(folder)
        prior = self._prior_checkpoint
        if self.image_encoder:
            vision.write_settings(prior, folder / vision.PART / "settings.json")
        settings = {
            "scheduler": self.prior_scheduler,
            "num_inference_steps": PRIOR_STEPS,
            "guidance_scale": PRIOR_GUIDANCE,
            **_read_statistics(prior, self.embedding),
            "zero": _embed_zeros(prior, self.embedding),
        }
        path = folder / "prior" / "settings.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @property
    def _prior_checkpoint(self) -> Checkpoint:
        assert self.prior is not None
        return self.prior

    def _prior(self, dtype: torch.dtype) -> GraphPlan:
        text = self.texts["text_encoder"]
        conditions: dict[str, Shape] = {
            "text_embeds": ("G*B", text.pooled or 0),
            "attention_mask": ("G*B", self.length),
        }
        return plan_step(
            "prior",
            PriorDenoiser(self._prior_checkpoint.load("prior", dtype), tuple(conditions)),
            ("B", self.embedding, 1, 1),
            {"encoder_hidden_states": ("G*B", self.length, text.width)},
            conditions,
        )

    def _denoiser(self, dtype: torch.dtype) -> GraphPlan:
        unet = self.checkpoint.load("unet", dtype)
        if hint.EMBEDS in self.conditions:
            unet = hint.without_hint(unet)
        return plan_step(
            "denoiser",
            ImageDenoiser(unet, tuple(self.conditions), self.options),
            ("B", self.latent.channels, "H", "W"),
            {"image_embeds": ("G*B", self.embedding)},
            self.conditions,
            factor=self.latent.multiple // self.latent.downscale,
        )

    def _vae_decoder(self, dtype: torch.dtype) -> GraphPlan:
        movq = self.checkpoint.load("movq", dtype)
        return self._decoder_plan(ImageDecoder(movq, 1.0, force_not_quantize=True))

    def _vae_encoder(self, dtype: torch.dtype) -> GraphPlan:
        latents = TensorSpec("latents", "float32", ("B", self.latent.channels, "H", "W"))
        return self._encoder_plan(QuantizedEncoder(self.checkpoint.load("movq", dtype)), (latents,))


def knows(pipeline: str) -> bool:
    """Whether a pipeline is of Kandinsky 2.2, even if it is one that cannot be exported by itself."""
    return pipeline.startswith("KandinskyV22")


def read_family(
    checkpoint: Checkpoint,
    prior: Checkpoint | None,
    *,
    thresholding: bool = False,
    image_encoder: bool = False,
) -> Kandinsky:
    """Read and check the configurations of a decoder and of its prior.

    `prior` None is right for a combined checkpoint, which holds both. `thresholding` asks for a denoiser that
    can threshold, even if the checkpoint's scheduler does not, `image_encoder` for the prior's image encoder.

    Raises:
        ExportError: one of the two is missing or another pipeline, they do not belong together, or a
            configuration that the graphs cannot express.
    """
    prior = _check_pair(checkpoint, prior)
    for part in ("unet", "movq"):
        checkpoint.check(part)
    for part in ("text_encoder", "prior", "image_encoder"):
        prior.check(part)
    unet, movq = checkpoint.config("unet"), checkpoint.config("movq")
    channels = whole(movq, "movq", "latent_channels")
    downscale = 2 ** (levels(movq, "movq") - 1)
    # As the pipelines round sizes; a UNet of more levels needs more.
    multiple = downscale * max(downscale, 2 ** (levels(unet, "unet") - 1))
    latent = Latent(channels, downscale, multiple)
    text = _read_text(prior)
    embedding = _check_widths(unet, prior, text)
    scheduler = read_scheduler(checkpoint, {})
    learned = scheduler.get("variance_type") in ("learned", "learned_range")
    return Kandinsky(
        checkpoint=checkpoint,
        latent=latent,
        texts={"text_encoder": text},
        conditions=_read_conditions(unet, channels),
        options=THRESHOLDING * bool(thresholding or scheduler.get("thresholding")) + VARIANCE * learned,
        scheduler=scheduler,
        defaults=read_defaults(checkpoint, unet, latent, STEPS, GUIDANCE),
        prior=prior,
        prior_scheduler=read_scheduler(prior, {}),
        embedding=embedding,
        image_encoder=image_encoder,
    )


def _check_pair(checkpoint: Checkpoint, prior: Checkpoint | None) -> Checkpoint:
    """The prior that belongs to a decoder: handed in, or in the same folder."""
    kind = checkpoint.pipeline
    if kind in PRIORS:
        raise ExportError(
            f"the checkpoint is a {kind}, the prior of Kandinsky: name the decoder's folder first, and this "
            "one as --prior"
        )
    if kind not in (*DECODERS, *COMBINED):
        raise ExportError(f"the checkpoint is a {kind}: this exporter knows {', '.join(DECODERS + COMBINED)}")
    if prior is None and kind in COMBINED:
        return replace(checkpoint, prefix="prior_")
    if prior is None:
        raise ExportError(
            f"the checkpoint is a {kind}, the decoder of Kandinsky, which needs a prior: name its folder, or "
            "hub id, as --prior"
        )
    if prior.pipeline not in PRIORS:
        raise ExportError(f"the prior is a {prior.pipeline}: it should be a {PRIORS[0]}")
    return prior


def _read_text(prior: Checkpoint) -> TextModel:
    part = "text_encoder"
    config = prior.config(part)
    length = whole(config, part, "max_position_embeddings")
    return TextModel(
        checkpoint=prior,
        part=part,
        tokenizer_part="tokenizer",
        tokenizer=read_tokenizer(prior, "tokenizer", length),
        width=whole(config, part, "hidden_size"),
        states=whole(config, part, "num_hidden_layers") + 1,
        pooled=whole(config, part, "projection_dim"),
    )


def _check_widths(unet: Mapping[str, Any], prior: Checkpoint, text: TextModel) -> int:
    """D, if text encoder, prior, image encoder and UNet agree on it, and the prior reads the whole prompt."""
    config, vision = prior.config("prior"), prior.config("image_encoder")
    embedding = whole(config, "prior", "embedding_dim")
    widths = {
        "the UNet takes (encoder_hid_dim)": unet.get("encoder_hid_dim"),
        "the image encoder makes (projection_dim)": vision.get("projection_dim"),
        "the prior makes (clip_embed_dim)": config.get("clip_embed_dim") or embedding,
        "the text encoder has as its states (hidden_size)": text.width,
        "the text encoder projects to (projection_dim)": text.pooled,
    }
    for what, width in widths.items():
        if width != embedding:
            raise ExportError(
                f"the prior has embeddings of width {embedding} (embedding_dim), but what {what} is {width}: "
                "they do not belong together"
            )
    if config.get("num_embeddings") != text.tokenizer.length:
        raise ExportError(
            f"the prior reads {config.get('num_embeddings')} states of text, the text encoder makes "
            f"{text.tokenizer.length}: they do not belong together"
        )
    if config.get("added_emb_type", "prd") != "prd" or config.get("encoder_hid_proj_type") != "linear":
        raise ExportError("the prior should have added_emb_type 'prd' and encoder_hid_proj_type 'linear'")
    return embedding


def _read_conditions(unet: Mapping[str, Any], channels: int) -> dict[str, Shape]:
    """What the UNet takes beyond the embedding: a mask and what it leaves, or a hint, or nothing."""
    kinds = unet.get("encoder_hid_dim_type"), unet.get("addition_embed_type")
    if kinds not in (("image_proj", "image"), ("image_proj", hint.KIND)):
        raise ExportError(
            f"the UNet has encoder_hid_dim_type {kinds[0]!r} and addition_embed_type {kinds[1]!r}: known are "
            f"'image_proj', and 'image' or {hint.KIND!r}"
        )
    taken, made = (whole(unet, "unet", f"{side}_channels") for side in ("in", "out"))
    if made != 2 * channels:
        raise ExportError(f"the UNet makes {made} channels: it should make {2 * channels}, half of variance")
    if kinds[1] == hint.KIND:
        if taken != channels + hint.CHANNELS:
            raise ExportError(
                f"the UNet takes {taken} channels: with a hint it should take {channels + hint.CHANNELS}"
            )
        return {hint.EMBEDS: ("B", hint.CHANNELS, "H", "W")}
    if taken == 2 * channels + 1:
        return {"masked_image_latents": ("B", channels, "H", "W"), "mask": ("B", 1, "H", "W")}
    if taken != channels:
        raise ExportError(
            f"the UNet takes {taken} channels and the autoencoder makes {channels}: known are UNets of "
            f"{channels}, and of {2 * channels + 1} for inpainting"
        )
    return {}


def _read_statistics(prior: Checkpoint, width: int) -> dict[str, list[float]]:
    """Mean and standard deviation, with which the prior's samples become embeddings of pictures."""
    place = prior.place("prior")
    weights = open_weights(sorted(place.glob("*.safetensors")))
    found = {
        name: weights[f"clip_{name}"].clone().float().flatten().tolist()
        for name in ("mean", "std")
        if f"clip_{name}" in weights
    }
    for name in ("mean", "std"):
        if len(found.get(name, ())) != width:
            raise ExportError(f"'{place}' has no clip_{name} of {width} numbers")
    return found


def _embed_zeros(prior: Checkpoint, width: int) -> list[float]:
    """What the image encoder makes of zeros, which stand for no picture: the reference's negative.

    Zeros after the normalisation, so not a black picture. Computed in float32 whatever is exported.
    """
    model: Any = prior.load("image_encoder", torch.float32)
    size = int(model.config.image_size)
    with torch.no_grad():
        embeds: list[float] = model(torch.zeros(1, 3, size, size)).image_embeds[0].tolist()
    if len(embeds) != width:
        raise ExportError(f"the image encoder makes {len(embeds)} numbers, not {width}")
    return embeds
