"""The Stable Diffusion 1.x/2.x family: which graphs it has and what a bundle needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allaprima.bundle import Defaults, ExportError, Latent, TensorSpec, TokenizerSpec
from allaprima.export.denoiser import Denoiser
from allaprima.export.encoders import ImageDecoder, ImageEncoder, TextEncoder
from allaprima.export.graph import GraphPlan
from allaprima.export.source import Checkpoint

HISTORY = 4
"""S: what the longest multistep samplers (PLMS, LMS of order 4) look back on."""
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")


@dataclass(frozen=True)
class Family:
    """A checkpoint's facts, read from its configuration files before any weights are loaded."""

    checkpoint: Checkpoint
    latent: Latent
    tokenizer: TokenizerSpec
    scheduler: Mapping[str, Any]
    defaults: Defaults
    text_width: int

    def plans(self, dtype: torch.dtype) -> Mapping[str, Callable[[], GraphPlan]]:
        """One late plan per component, so that only one component's weights are in memory at a time."""
        return {
            "text_encoder": lambda: self._text_encoder(dtype),
            "denoiser": lambda: self._denoiser(dtype),
            "vae_decoder": lambda: self._vae_decoder(dtype),
            "vae_encoder": lambda: self._vae_encoder(dtype),
        }

    def _text_encoder(self, dtype: torch.dtype) -> GraphPlan:
        length = self.tokenizer.length
        return GraphPlan(
            name="text_encoder",
            module=TextEncoder(self.checkpoint.load("text_encoder", dtype)),
            example={"input_ids": torch.full((2, length), self.tokenizer.eos, dtype=torch.int64)},
            axes={"input_ids": {0: "B"}},
            inputs=(TensorSpec("input_ids", "int64", ("B", length)),),
            outputs=(TensorSpec("last_hidden_state", "float32", ("B", length, self.text_width)),),
        )

    def _denoiser(self, dtype: torch.dtype) -> GraphPlan:
        channels, factor = self.latent.channels, self.latent.multiple // self.latent.downscale
        length, width = self.tokenizer.length, self.text_width
        image = ("B", channels, "H", "W")
        shapes: dict[str, tuple[int | str, ...]] = {
            "sample": image,
            "history": (HISTORY, *image),
            "noise": image,
            "timestep": ("B",),
            "input_scale": ("B",),
            "guidance": ("G", "B"),
            "to_prediction": ("B", 2),
            "bounds": ("B",),
            "update": ("B", 3 + HISTORY),
            "encoder_hidden_states": ("G*B", length, width),
        }
        specs = tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items())
        # No two extents agree, so that none is taken for another; the UNet halves H and W `levels - 1` times.
        sizes = {"B": 3, "G": 2, "G*B": 6, "H": 5 * factor, "W": 7 * factor}
        dims: dict[str, Any] = {"B": "B", "G": "G", "G*B": "GB"}
        dims |= {axis: factor * torch.export.Dim(axis.lower(), min=1, max=4096) for axis in ("H", "W")}
        return GraphPlan(
            name="denoiser",
            module=Denoiser(self.checkpoint.load("unet", dtype)),
            example={spec.name: torch.randn(spec.resolve(sizes)) for spec in specs},
            axes={
                spec.name: {k: dims[axis] for k, axis in enumerate(spec.shape) if isinstance(axis, str)}
                for spec in specs
            },
            inputs=specs,
            outputs=(
                TensorSpec("next_sample", "float32", image),
                TensorSpec("next_history", "float32", (HISTORY, *image)),
            ),
        )

    def _vae_decoder(self, dtype: torch.dtype) -> GraphPlan:
        vae = self.checkpoint.load("vae", dtype)
        scale = self.latent.downscale
        return GraphPlan(
            name="vae_decoder",
            module=ImageDecoder(vae, vae.config.scaling_factor),
            example={"sample": torch.randn(2, self.latent.channels, 6, 10)},
            axes={"sample": {0: "B", 2: "H", 3: "W"}},
            inputs=(TensorSpec("sample", "float32", ("B", self.latent.channels, "H", "W")),),
            outputs=(TensorSpec("image", "uint8", ("B", f"{scale}*H", f"{scale}*W", 3)),),
        )

    def _vae_encoder(self, dtype: torch.dtype) -> GraphPlan:
        scale = self.latent.downscale
        height, width = (scale * torch.export.Dim(axis, min=1, max=4096) for axis in ("h", "w"))
        return GraphPlan(
            name="vae_encoder",
            module=ImageEncoder(self.checkpoint.load("vae", dtype)),
            example={"image": torch.rand(2, 3, 6 * scale, 10 * scale) * 2 - 1},
            axes={"image": {0: "B", 2: height, 3: width}},
            inputs=(TensorSpec("image", "float32", ("B", 3, f"{scale}*H", f"{scale}*W")),),
            outputs=(TensorSpec("moments", "float32", ("B", 2 * self.latent.channels, "H", "W")),),
        )


def read_family(checkpoint: Checkpoint) -> Family:
    """Read and check the configuration of a Stable Diffusion checkpoint.

    Raises:
        ExportError: another pipeline class, or a configuration that this family's graphs cannot express.
    """
    if checkpoint.pipeline not in PIPELINES:
        known = ", ".join(PIPELINES)
        raise ExportError(f"the checkpoint is a {checkpoint.pipeline}: this exporter knows {known}")
    unet, vae, text = (checkpoint.config(part) for part in ("unet", "vae", "text_encoder"))
    channels = int(vae.get("latent_channels", 4))
    if unet.get("in_channels", 4) != channels:
        raise ExportError(
            f"the UNet takes {unet['in_channels']} channels, the autoencoder makes {channels}: "
            "inpainting and other widened UNets are not supported yet"
        )
    if unet.get("time_cond_proj_dim") or unet.get("class_embed_type") or unet.get("addition_embed_type"):
        raise ExportError("the UNet takes conditions beyond the prompt: such models are not supported yet")
    text_width = int(text["hidden_size"])
    if unet.get("cross_attention_dim") != text_width:
        raise ExportError(
            f"the UNet expects text states of width {unet.get('cross_attention_dim')}, "
            f"the text encoder makes {text_width}: they do not belong together"
        )
    downscale = 2 ** (len(vae["block_out_channels"]) - 1)
    latent = Latent(channels, downscale, downscale * 2 ** (len(unet["block_out_channels"]) - 1))
    return Family(
        checkpoint=checkpoint,
        latent=latent,
        tokenizer=_read_tokenizer(checkpoint, int(text["max_position_embeddings"])),
        scheduler=read_scheduler(checkpoint),
        defaults=_read_defaults(checkpoint, unet, latent),
        text_width=text_width,
    )


def read_scheduler(checkpoint: Checkpoint) -> dict[str, Any]:
    """The scheduler's full configuration, as StableDiffusionPipeline corrects it when it loads (offset 1, no clipping)."""
    import diffusers

    name = str(checkpoint.index.get("scheduler", [None, None])[1])
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ExportError(f"the checkpoint's scheduler is of class {name}, which diffusers does not have")
    try:
        config = dict(kind.from_pretrained(checkpoint.folder / "scheduler").config)
    except Exception as cause:
        raise ExportError(f"the scheduler's configuration cannot be read: {cause}") from cause
    # Named even where the class has no such field, since another sampler may be made from this configuration.
    forced = {"steps_offset": 1, "clip_sample": False}
    defaulted = [field for field in config.get("_use_default_values", []) if field not in forced]
    return {"_class_name": name, **config, **forced, "_use_default_values": defaulted}


def write_tokenizer(checkpoint: Checkpoint, path: Path) -> None:
    """Write the tokenizer as one file of the `tokenizers` library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _load_tokenizer(checkpoint).backend_tokenizer.save(str(path))


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(checkpoint.folder / "tokenizer", local_files_only=True)
    except Exception as cause:
        raise ExportError(f"the tokenizer in '{checkpoint.folder}' cannot be loaded: {cause}") from cause


def _read_tokenizer(checkpoint: Checkpoint, length: int) -> TokenizerSpec:
    tokenizer = _load_tokenizer(checkpoint)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if None in ids:
        raise ExportError("the tokenizer lacks a beginning, an end or a padding token")
    return TokenizerSpec("tokenizer/tokenizer.json", min(length, tokenizer.model_max_length), *ids)


def _read_defaults(checkpoint: Checkpoint, unet: Mapping[str, Any], latent: Latent) -> Defaults:
    """The trained size; steps and guidance from an optional generation_config.json, else the pipeline's own."""
    side = int(unet.get("sample_size") or 64) * latent.downscale
    chosen: Mapping[str, Any] = {}
    if (checkpoint.folder / "generation_config.json").is_file():
        chosen = checkpoint.config(".", "generation_config.json")
    try:
        return Defaults(
            side, side, int(chosen.get("num_inference_steps", 50)), float(chosen.get("guidance_scale", 7.5))
        )
    except (TypeError, ValueError) as cause:
        raise ExportError(f"generation_config.json is not usable: {cause}") from cause
