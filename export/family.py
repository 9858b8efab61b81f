"""A checkpoint as the graphs of a bundle: what there is to know of it, and how each graph is traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from allaprima.bundle import Defaults, Latent, TensorSpec, TokenizerSpec
from allaprima.export import safety
from allaprima.export.configuration import write_tokenizer
from allaprima.export.denoiser import Denoiser
from allaprima.export.encoders import ImageDecoder, ImageEncoder, TextEncoder
from allaprima.export.graph import GraphPlan
from allaprima.export.source import Checkpoint
from allaprima.export.step import Shape, plan_step
from allaprima.export.step_cache import DEEP, SHALLOW, plan_deep, plan_shallow


@dataclass(frozen=True)
class TextModel:
    """A text encoder: where its model and tokenizer are, and what is taken from it.

    `states` counts the hidden states that a prompt's may be mixed of, `width` is theirs, `pooled` that of the
    text's vector, None where the UNet takes none. `penultimate`: see `encoders.TextEncoder`.
    """

    checkpoint: Checkpoint
    part: str
    tokenizer_part: str
    tokenizer: TokenizerSpec
    width: int
    states: int
    pooled: int | None = None
    penultimate: bool = False


@dataclass(frozen=True)
class Family:
    """A checkpoint's facts, read from its configuration files before any weights are loaded.

    `texts` are the text encoders by component, `conditions` the shapes of what the UNet takes beyond the
    first one's states, `options` what else its graph can (see `denoiser.Denoiser`). `wide`: the autoencoder's
    values leave the range of fp16. `text_encoder_weights`: "int8" if those of the text encoders' matrix
    products are to be quantized. `step_cache`: how many layers of the UNet are shallow to the step cache (see
    `step_cache.Cut`), 0 if the bundle is to have none.
    """

    checkpoint: Checkpoint
    latent: Latent
    texts: Mapping[str, TextModel]
    conditions: Mapping[str, Shape]
    scheduler: Mapping[str, Any]
    defaults: Defaults
    options: tuple[str, ...] = ()
    zero_negative: bool = False
    wide: bool = False
    text_encoder_weights: str | None = None
    step_cache: int = 0

    name: ClassVar[str] = "stable-diffusion"
    """What the manifest calls the family."""

    @property
    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """By the component that they belong to."""
        return {role: text.tokenizer for role, text in self.texts.items()}

    @property
    def length(self) -> int:
        """L, the number of tokens of one prompt."""
        return next(iter(self.texts.values())).tokenizer.length

    def dtype(self, component: str, wanted: torch.dtype) -> torch.dtype:
        """What a component's weights are written in."""
        if wanted != torch.float16 or not self.overflows(component):
            return wanted
        # A text encoder may be most of a model, so it should not take twice the space.
        return torch.bfloat16 if component in self.texts else torch.float32

    def overflows(self, component: str) -> bool:
        """Whether a component's values leave the range of fp16."""
        return self.wide and component in ("vae_decoder", "vae_encoder")

    def weights(self, component: str) -> str | None:
        """What a component's weights are quantized to, None if they are not."""
        return self.text_encoder_weights if component in self.texts else None

    def write_files(self, folder: Path) -> None:
        """Write what the runtime needs beside the graphs into the bundle's folder. Raises ExportError."""
        for text in self.texts.values():
            write_tokenizer(text.checkpoint, text.tokenizer_part, folder / text.tokenizer.file)
        if safety.has_safety_checker(self.checkpoint):
            safety.write_settings(self.checkpoint, folder / safety.PART / "settings.json")

    def plans(self, dtype: torch.dtype) -> Mapping[str, Callable[[], GraphPlan]]:
        """One late plan per component, so that only one component's weights are in memory at a time."""
        plans: dict[str, Callable[[], GraphPlan]] = {}
        for role in self.texts:
            plans[role] = lambda role=role: self._text_encoder(role, self.dtype(role, dtype))  # type: ignore[misc]
        plans["denoiser"] = lambda: self._denoiser(dtype)
        if self.step_cache:
            plans[DEEP] = lambda: plan_deep(self._denoiser(dtype), self.step_cache)
            plans[SHALLOW] = lambda: plan_shallow(self._denoiser(dtype), self.step_cache)
        plans["vae_decoder"] = lambda: self._vae_decoder(self.dtype("vae_decoder", dtype))
        plans["vae_encoder"] = lambda: self._vae_encoder(self.dtype("vae_encoder", dtype))
        if safety.has_safety_checker(self.checkpoint):
            plans[safety.PART] = lambda: safety.plan(self.checkpoint, dtype)
        return plans

    def _text_encoder(self, role: str, dtype: torch.dtype) -> GraphPlan:
        text = self.texts[role]
        length, pooled = text.tokenizer.length, text.pooled is not None
        outputs = [TensorSpec("last_hidden_state", "float32", ("B", length, text.width))]
        if text.pooled is not None:
            outputs.append(TensorSpec("text_embeds", "float32", ("B", text.pooled)))
        return GraphPlan(
            name=role,
            module=TextEncoder(
                text.checkpoint.load(text.part, dtype), penultimate=text.penultimate, pooled=pooled
            ),
            example={
                "input_ids": torch.full((2, length), text.tokenizer.eos, dtype=torch.int64),
                "layer_weights": torch.randn(2, text.states),
            },
            axes={"input_ids": {0: "B"}, "layer_weights": {0: "B"}},
            inputs=(
                TensorSpec("input_ids", "int64", ("B", length)),
                TensorSpec("layer_weights", "float32", ("B", text.states)),
            ),
            outputs=tuple(outputs),
        )

    def _denoiser(self, dtype: torch.dtype) -> GraphPlan:
        # diffusers' pipelines of Stable Diffusion guide all that the UNet makes.
        return plan_step(
            "denoiser",
            Denoiser(
                self.checkpoint.load("unet", dtype),
                tuple(self.conditions),
                self.options,
                guided_variance=True,
            ),
            ("B", self.latent.channels, "H", "W"),
            {"encoder_hidden_states": ("G*B", "L", next(iter(self.texts.values())).width)},
            self.conditions,
            factor=self.latent.multiple // self.latent.downscale,
            length=2 * self.length,  # a prompt is one chunk or more, one after the other
        )

    def _vae_decoder(self, dtype: torch.dtype) -> GraphPlan:
        vae = self.checkpoint.load("vae", dtype)
        config: Any = vae.config
        return self._decoder_plan(ImageDecoder(vae, float(config.scaling_factor)))

    def _decoder_plan(self, module: torch.nn.Module) -> GraphPlan:
        scale, channels = self.latent.downscale, self.latent.channels
        return GraphPlan(
            name="vae_decoder",
            module=module,
            example={"sample": torch.randn(2, channels, 6, 10)},
            axes={"sample": {0: "B", 2: "H", 3: "W"}},
            inputs=(TensorSpec("sample", "float32", ("B", channels, "H", "W")),),
            outputs=(
                TensorSpec("image", "uint8", ("B", f"{scale}*H", f"{scale}*W", 3)),
                TensorSpec("finite", "float32", ("B",)),
            ),
        )

    def _vae_encoder(self, dtype: torch.dtype) -> GraphPlan:
        vae, latents = self.checkpoint.load("vae", dtype), ("B", self.latent.channels, "H", "W")
        config: Any = vae.config
        return self._encoder_plan(
            ImageEncoder(vae, float(config.scaling_factor)),
            tuple(TensorSpec(name, "float32", latents) for name in ("mean", "deviation")),
        )

    def _encoder_plan(self, module: torch.nn.Module, outputs: tuple[TensorSpec, ...]) -> GraphPlan:
        scale = self.latent.downscale
        height, width = (scale * torch.export.Dim(axis, min=1, max=4096) for axis in ("h", "w"))
        return GraphPlan(
            name="vae_encoder",
            module=module,
            example={"image": torch.rand(2, 3, 6 * scale, 10 * scale) * 2 - 1},
            axes={"image": {0: "B", 2: height, 3: width}},
            inputs=(TensorSpec("image", "float32", ("B", 3, f"{scale}*H", f"{scale}*W")),),
            outputs=outputs,
        )
