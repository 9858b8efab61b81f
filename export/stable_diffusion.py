"""The Stable Diffusion 1.x/2.x family: which graphs it has and what a bundle needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allaprima.bundle import Defaults, ExportError, Latent, TensorSpec, TokenizerSpec
from allaprima.export import safety
from allaprima.export.denoiser import Denoiser
from allaprima.export.encoders import ImageDecoder, ImageEncoder, TextEncoder
from allaprima.export.graph import GraphPlan
from allaprima.export.reason import reason
from allaprima.export.source import Checkpoint
from allaprima.export.update import OPTIONS, THRESHOLDING, VARIANCE

HISTORY = 4
"""S: what the longest multistep samplers (PLMS, LMS of order 4) look back on."""
MODELS = ("unet", "vae", "text_encoder")
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
    text_layers: int
    options: tuple[str, ...]
    """Of the denoiser, beyond what every one has."""

    def plans(self, dtype: torch.dtype) -> Mapping[str, Callable[[], GraphPlan]]:
        """One late plan per component, so that only one component's weights are in memory at a time."""
        plans = {
            "text_encoder": lambda: self._text_encoder(dtype),
            "denoiser": lambda: self._denoiser(dtype),
            "vae_decoder": lambda: self._vae_decoder(dtype),
            "vae_encoder": lambda: self._vae_encoder(dtype),
        }
        if safety.has_safety_checker(self.checkpoint):
            plans[safety.PART] = lambda: safety.plan(self.checkpoint, dtype)
        return plans

    def _text_encoder(self, dtype: torch.dtype) -> GraphPlan:
        length, states = self.tokenizer.length, self.text_layers + 1
        return GraphPlan(
            name="text_encoder",
            module=TextEncoder(self.checkpoint.load("text_encoder", dtype)),
            example={
                "input_ids": torch.full((2, length), self.tokenizer.eos, dtype=torch.int64),
                "layer_weights": torch.randn(2, states),
            },
            axes={"input_ids": {0: "B"}, "layer_weights": {0: "B"}},
            inputs=(
                TensorSpec("input_ids", "int64", ("B", length)),
                TensorSpec("layer_weights", "float32", ("B", states)),
            ),
            outputs=(TensorSpec("last_hidden_state", "float32", ("B", length, self.text_width)),),
        )

    def _denoiser(self, dtype: torch.dtype) -> GraphPlan:
        channels, factor = self.latent.channels, self.latent.multiple // self.latent.downscale
        width = self.text_width
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
            "update": ("B", 4 + HISTORY),
            "encoder_hidden_states": ("G*B", "L", width),
            "guidance_rescale": ("B",),
            **{name: ("B", OPTIONS[name]) for name in self.options},
        }
        specs = tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items())
        # No two extents agree, so that none is taken for another; the UNet halves H and W `levels - 1` times.
        sizes = {"B": 3, "G": 2, "G*B": 6, "H": 5 * factor, "W": 7 * factor}
        sizes["L"] = 2 * self.tokenizer.length  # a prompt is one chunk or more, one after the other
        dims: dict[str, Any] = {"B": "B", "G": "G", "G*B": "GB", "L": "L"}
        dims |= {axis: factor * torch.export.Dim(axis.lower(), min=1, max=4096) for axis in ("H", "W")}
        return GraphPlan(
            name="denoiser",
            # StableDiffusionPipeline guides all that the UNet makes.
            module=Denoiser(self.checkpoint.load("unet", dtype), self.options, guided_variance=True),
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
        config: Any = vae.config
        scale = self.latent.downscale
        return GraphPlan(
            name="vae_decoder",
            module=ImageDecoder(vae, float(config.scaling_factor)),
            example={"sample": torch.randn(2, self.latent.channels, 6, 10)},
            axes={"sample": {0: "B", 2: "H", 3: "W"}},
            inputs=(TensorSpec("sample", "float32", ("B", self.latent.channels, "H", "W")),),
            outputs=(TensorSpec("image", "uint8", ("B", f"{scale}*H", f"{scale}*W", 3)),),
        )

    def _vae_encoder(self, dtype: torch.dtype) -> GraphPlan:
        scale = self.latent.downscale
        height, width = (scale * torch.export.Dim(axis, min=1, max=4096) for axis in ("h", "w"))
        vae, latents = self.checkpoint.load("vae", dtype), ("B", self.latent.channels, "H", "W")
        config: Any = vae.config
        return GraphPlan(
            name="vae_encoder",
            module=ImageEncoder(vae, float(config.scaling_factor)),
            example={"image": torch.rand(2, 3, 6 * scale, 10 * scale) * 2 - 1},
            axes={"image": {0: "B", 2: height, 3: width}},
            inputs=(TensorSpec("image", "float32", ("B", 3, f"{scale}*H", f"{scale}*W")),),
            outputs=tuple(TensorSpec(name, "float32", latents) for name in ("mean", "deviation")),
        )


def read_family(checkpoint: Checkpoint, *, thresholding: bool = False) -> Family:
    """Read and check the configuration of a Stable Diffusion checkpoint.

    `thresholding` asks for a denoiser that can threshold, even if the checkpoint's scheduler does not.

    Raises:
        ExportError: another pipeline class, or a configuration that this family's graphs cannot express.
    """
    if checkpoint.pipeline not in PIPELINES:
        known = ", ".join(PIPELINES)
        raise ExportError(f"the checkpoint is a {checkpoint.pipeline}: this exporter knows {known}")
    for part in MODELS:
        checkpoint.check(part)
    unet, vae, text = (checkpoint.config(part) for part in MODELS)
    channels = _whole(vae, "vae", "latent_channels")
    text_width = _whole(text, "text_encoder", "hidden_size")
    _check_unet(unet, channels, text_width)
    scheduler = read_scheduler(checkpoint)
    learned = unet["out_channels"] == 2 * channels
    options = THRESHOLDING * bool(thresholding or scheduler.get("thresholding")) + VARIANCE * learned
    downscale = 2 ** (_levels(vae, "vae") - 1)
    latent = Latent(channels, downscale, downscale * 2 ** (_levels(unet, "unet") - 1))
    return Family(
        checkpoint=checkpoint,
        latent=latent,
        tokenizer=_read_tokenizer(checkpoint, _whole(text, "text_encoder", "max_position_embeddings")),
        scheduler=scheduler,
        defaults=_read_defaults(checkpoint, unet, latent),
        text_width=text_width,
        text_layers=_whole(text, "text_encoder", "num_hidden_layers"),
        options=options,
    )


def _check_unet(unet: Mapping[str, Any], channels: int, text_width: int) -> None:
    """ExportError unless the UNet goes from latents of `channels` and text of `text_width` to latents."""
    taken, made = (_whole(unet, "unet", f"{side}_channels") for side in ("in", "out"))
    if taken != channels:
        raise ExportError(
            f"the UNet takes {taken} channels, the autoencoder makes {channels}: "
            "inpainting and other widened UNets are not supported yet"
        )
    if made not in (channels, 2 * channels):
        raise ExportError(
            f"the UNet makes {made} channels of {channels}: it should make as many, or twice as many with a "
            "learned variance"
        )
    if unet.get("time_cond_proj_dim") or unet.get("class_embed_type") or unet.get("addition_embed_type"):
        raise ExportError("the UNet takes conditions beyond the prompt: such models are not supported yet")
    if unet.get("cross_attention_dim") != text_width:
        raise ExportError(
            f"the UNet expects text states of width {unet.get('cross_attention_dim')}, "
            f"the text encoder makes {text_width}: they do not belong together"
        )


def _whole(config: Mapping[str, Any], part: str, field: str) -> int:
    value = config.get(field)
    if type(value) is not int or value < 1:
        raise ExportError(f"{field} in the config.json of {part} should be a positive number, not {value!r}")
    return value


def _levels(config: Mapping[str, Any], part: str) -> int:
    value = config.get("block_out_channels")
    if not (isinstance(value, list) and value):
        raise ExportError(f"block_out_channels in the config.json of {part} should be a list, not {value!r}")
    return len(value)


def read_scheduler(checkpoint: Checkpoint) -> dict[str, Any]:
    """The scheduler's full configuration as StableDiffusionPipeline corrects it: offset 1, no clipping."""
    import diffusers

    name = checkpoint.kind("scheduler")
    kind: Any = getattr(diffusers, name, None)
    known = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    if not known:
        raise ExportError(f"the checkpoint's scheduler is of class {name}, which diffusers does not have")
    given = checkpoint.config("scheduler", "scheduler_config.json")
    try:
        config = dict(kind.from_config(given).config)
    except Exception as cause:
        raise ExportError(f"the scheduler's configuration is not usable: {reason(cause)}") from cause
    # Named even where the class has no such field, since another sampler may be made from this configuration.
    forced = {"steps_offset": 1, "clip_sample": False}
    defaulted = [field for field in config.get("_use_default_values", []) if field not in forced]
    return {"_class_name": name, **config, **forced, "_use_default_values": defaulted}


def write_tokenizer(checkpoint: Checkpoint, path: Path) -> None:
    """Write the tokenizer as one file of the `tokenizers` library; ExportError if the disk refuses."""
    tokenizer = _load_tokenizer(checkpoint).backend_tokenizer
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(path))
    except Exception as cause:  # the library has no error class of its own
        raise ExportError(f"{path} cannot be written: {reason(cause)}") from cause


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(checkpoint.folder / "tokenizer", local_files_only=True)
    except Exception as cause:
        raise ExportError(
            f"the tokenizer in '{checkpoint.folder}' cannot be loaded: {reason(cause)}"
        ) from cause


def _read_tokenizer(checkpoint: Checkpoint, length: int) -> TokenizerSpec:
    tokenizer = _load_tokenizer(checkpoint)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if None in ids:
        raise ExportError("the tokenizer lacks a beginning, an end or a padding token")
    return TokenizerSpec("tokenizer/tokenizer.json", min(length, tokenizer.model_max_length), *ids)


def _read_defaults(checkpoint: Checkpoint, unet: Mapping[str, Any], latent: Latent) -> Defaults:
    """The trained size; steps and guidance from generation_config.json or the pipeline's."""
    size = unet.get("sample_size") or 64
    chosen: Mapping[str, Any] = {}
    if (checkpoint.folder / "generation_config.json").is_file():
        chosen = checkpoint.config(".", "generation_config.json")
    try:
        height, width = size if isinstance(size, list) else (size, size)
        return Defaults(
            height=int(height) * latent.downscale,
            width=int(width) * latent.downscale,
            num_inference_steps=int(chosen.get("num_inference_steps", 50)),
            guidance_scale=float(chosen.get("guidance_scale", 7.5)),
        )
    except (TypeError, ValueError) as cause:
        raise ExportError(
            f"the checkpoint's defaults (generation_config.json) are not usable: {reason(cause)}"
        ) from cause
