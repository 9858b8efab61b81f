"""Kandinsky 3: a text encoder of T5's kind, one UNet, and Kandinsky's autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from allaprima.bundle import ExportError, Latent, TensorSpec
from allaprima.export.configuration import levels, read_defaults, read_scheduler, read_tokenizer, whole
from allaprima.export.encoders import ImageDecoder, QuantizedEncoder
from allaprima.export.family import Family, TextModel
from allaprima.export.graph import GraphPlan
from allaprima.export.masked import MaskedDenoiser
from allaprima.export.source import Checkpoint
from allaprima.export.step import plan_step
from allaprima.export.t5 import plan_t5
from allaprima.export.update import THRESHOLDING

PIPELINES = ("Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline")
STEPS, GUIDANCE = 25, 3.0
"""What diffusers' pipelines take if nobody says."""
LENGTH = 128
"""The tokens of a prompt: the pipelines' choice, whatever the tokenizer would take."""
SIDE = 128
"""Of the latents that the model was trained on, which no configuration says."""


@dataclass(frozen=True)
class Kandinsky3(Family):
    """A checkpoint whose UNet is told masked text."""

    name: ClassVar[str] = "kandinsky-3"

    def overflows(self, component: str) -> bool:
        """The text encoder's values leave the range of fp16."""
        return component in self.texts

    def _text_encoder(self, role: str, dtype: torch.dtype) -> GraphPlan:
        text = self.texts[role]
        return plan_t5(text.checkpoint, text.part, text.tokenizer, text.width, dtype)

    def _denoiser(self, dtype: torch.dtype) -> GraphPlan:
        return plan_step(
            "denoiser",
            MaskedDenoiser(self.checkpoint.load("unet", dtype), tuple(self.conditions), self.options),
            ("B", self.latent.channels, "H", "W"),
            {"encoder_hidden_states": ("G*B", "L", self.texts["text_encoder"].width)},
            self.conditions,
            factor=self.latent.multiple // self.latent.downscale,
            length=LENGTH // 2,
        )

    def _vae_decoder(self, dtype: torch.dtype) -> GraphPlan:
        movq = self.checkpoint.load("movq", dtype)
        return self._decoder_plan(ImageDecoder(movq, 1.0, force_not_quantize=True))

    def _vae_encoder(self, dtype: torch.dtype) -> GraphPlan:
        latents = TensorSpec("latents", "float32", ("B", self.latent.channels, "H", "W"))
        return self._encoder_plan(QuantizedEncoder(self.checkpoint.load("movq", dtype)), (latents,))


def knows(pipeline: str) -> bool:
    """Whether a pipeline is of Kandinsky 3."""
    return pipeline in PIPELINES


def read_family(checkpoint: Checkpoint, *, thresholding: bool = False) -> Kandinsky3:
    """Read and check the configuration of a Kandinsky 3 checkpoint.

    `thresholding` asks for a denoiser that can threshold, even if the checkpoint's scheduler does not.

    Raises:
        ExportError: parts that are missing or do not belong together, or a configuration that the graphs
            cannot express.
    """
    for part in ("text_encoder", "unet", "movq"):
        checkpoint.check(part)
    unet, movq = checkpoint.config("unet"), checkpoint.config("movq")
    channels = whole(movq, "movq", "latent_channels")
    downscale = 2 ** (levels(movq, "movq") - 1)
    latent = Latent(channels, downscale, downscale * 2 ** (levels(unet, "unet") - 1))
    text = _read_text(checkpoint)
    _check_unet(unet, channels, text)
    scheduler = read_scheduler(checkpoint, {})
    return Kandinsky3(
        checkpoint=checkpoint,
        latent=latent,
        texts={"text_encoder": text},
        conditions={"encoder_attention_mask": ("G*B", "L"), "pooling_weights": ("G*B", "L")},
        options=THRESHOLDING * bool(thresholding or scheduler.get("thresholding")),
        scheduler=scheduler,
        defaults=read_defaults(checkpoint, {"sample_size": SIDE, **unet}, latent, STEPS, GUIDANCE),
        zero_negative=True,
    )


def _read_text(checkpoint: Checkpoint) -> TextModel:
    part, tokenizer = "text_encoder", "tokenizer"
    config = checkpoint.config(part)
    return TextModel(
        checkpoint=checkpoint,
        part=part,
        tokenizer_part=tokenizer,
        tokenizer=replace(read_tokenizer(checkpoint, tokenizer, LENGTH, bos=False), length=LENGTH),
        width=whole(config, part, "d_model"),
        states=1,
    )


def _check_unet(unet: Mapping[str, Any], channels: int, text: TextModel) -> None:
    """ExportError unless the UNet goes from latents of `channels`, and states of this text, to latents."""
    if unet.get("encoder_hid_dim") != text.width:
        raise ExportError(
            f"the UNet expects text states of width {unet.get('encoder_hid_dim')} (encoder_hid_dim), the "
            f"text encoder makes {text.width} (d_model): they do not belong together"
        )
    taken = whole(unet, "unet", "in_channels")
    if taken == 2 * channels + 1:
        raise ExportError(
            f"the UNet takes {taken} channels, as one for inpainting does, but diffusers has no inpainting "
            f"of Kandinsky 3 and would make {taken} channels of them: export the usual one of {channels}, "
            "which takes a mask too"
        )
    if taken != channels:
        raise ExportError(
            f"the UNet takes {taken} channels and the autoencoder makes {channels}: they do not belong "
            "together"
        )
