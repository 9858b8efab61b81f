"""Stable Diffusion 1.x, 2.x and XL, fine-tuned or distilled: what a checkpoint of them is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allaprima.bundle import ExportError, Latent
from allaprima.export.configuration import levels, read_defaults, read_scheduler, read_tokenizer, whole
from allaprima.export.family import Family, TextModel
from allaprima.export.source import Checkpoint
from allaprima.export.step import Shape
from allaprima.export.update import THRESHOLDING, VARIANCE

_TASKS = ("", "Img2Img", "Inpaint")
FIRST = tuple(f"StableDiffusion{task}Pipeline" for task in _TASKS)
LARGE = tuple(f"StableDiffusionXL{task}Pipeline" for task in _TASKS)
CONSISTENCY = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
PIPELINES = (*FIRST, *LARGE, *CONSISTENCY)
USUAL = {FIRST: (50, 7.5), LARGE: (50, 5.0), CONSISTENCY: (4, 8.5)}
"""Steps and guidance scale that diffusers' pipelines take if nobody says."""


def read_family(checkpoint: Checkpoint, *, thresholding: bool = False) -> Family:
    """Read and check the configuration of a Stable Diffusion checkpoint.

    `thresholding` asks for a denoiser that can threshold, even if the checkpoint's scheduler does not.

    Raises:
        ExportError: another pipeline class, or a configuration that this family's graphs cannot express.
    """
    if checkpoint.pipeline not in PIPELINES:
        known = ", ".join(PIPELINES)
        raise ExportError(
            f"the checkpoint is a {checkpoint.pipeline}: this exporter knows {known}, Kandinsky 2.2 and 3"
        )
    large = checkpoint.pipeline in LARGE
    texts = _read_texts(checkpoint, large=large)
    for part in ("unet", "vae"):
        checkpoint.check(part)
    unet, vae = checkpoint.config("unet"), checkpoint.config("vae")
    _check_scaling(vae)
    channels = whole(vae, "vae", "latent_channels")
    conditions = _read_conditions(unet, channels, texts)
    downscale = 2 ** (levels(vae, "vae") - 1)
    latent = Latent(channels, downscale, downscale * 2 ** (levels(unet, "unet") - 1))
    # As the first classes correct their schedulers: an early release had them otherwise.
    forced = {"steps_offset": 1, "clip_sample": False} if checkpoint.pipeline in FIRST else {}
    given = checkpoint.config("scheduler", "scheduler_config.json")
    if "clip_sample" not in given:
        # The default of other classes, from which another sampler may be chosen, is made for pixels.
        forced["clip_sample"] = False
    scheduler = read_scheduler(checkpoint, forced)
    learned = unet["out_channels"] == 2 * channels
    usual = next(numbers for names, numbers in USUAL.items() if checkpoint.pipeline in names)
    return Family(
        checkpoint=checkpoint,
        latent=latent,
        texts=texts,
        conditions=conditions,
        options=THRESHOLDING * bool(thresholding or scheduler.get("thresholding")) + VARIANCE * learned,
        scheduler=scheduler,
        defaults=read_defaults(checkpoint, unet, latent, *usual),
        zero_negative=large and bool(checkpoint.index.get("force_zeros_for_empty_prompt", True)),
        wide=large and bool(vae.get("force_upcast", True)),
    )


def _check_scaling(vae: Mapping[str, Any]) -> None:
    """ExportError for latents that are more than scaled on the way to the denoiser."""
    for field in ("latents_mean", "latents_std", "shift_factor"):
        if vae.get(field):
            raise ExportError(
                f"the autoencoder has {field} {vae[field]!r}: known are those that only scale "
                "(scaling_factor)"
            )


def _read_texts(checkpoint: Checkpoint, *, large: bool) -> dict[str, TextModel]:
    """The text encoders by component: a refiner's only one, text_encoder_2, is the bundle's first."""
    suffixes = [suffix for suffix in ("", "_2") if large and checkpoint.has(f"text_encoder{suffix}")] or [""]
    texts = {}
    for role, suffix in zip(("text_encoder", "text_encoder_2"), suffixes, strict=False):
        part, tokenizer_part = f"text_encoder{suffix}", f"tokenizer{suffix}"
        checkpoint.check(part)
        config = checkpoint.config(part)
        layers = whole(config, part, "num_hidden_layers")
        texts[role] = TextModel(
            checkpoint=checkpoint,
            part=part,
            tokenizer_part=tokenizer_part,
            tokenizer=read_tokenizer(
                checkpoint, tokenizer_part, whole(config, part, "max_position_embeddings")
            ),
            width=whole(config, part, "hidden_size"),
            states=layers if large else layers + 1,
            pooled=whole(config, part, "projection_dim") if suffix else None,
            penultimate=large,
        )
    return texts


def _read_conditions(
    unet: Mapping[str, Any], channels: int, texts: Mapping[str, TextModel]
) -> dict[str, Shape]:
    """What the UNet takes beyond the first text encoder's states.

    Raises ExportError unless it goes from latents of `channels`, and text of these encoders, to latents.
    """
    for field in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if unet.get(field):
            raise ExportError(
                f"the UNet has {field} {unet[field]!r}, a condition that Stable Diffusion does not have"
            )
    width, conditions = sum(text.width for text in texts.values()), dict[str, Shape]()
    if unet.get("cross_attention_dim") != width:
        raise ExportError(
            f"the UNet expects text states of width {unet.get('cross_attention_dim')}, "
            f"the text encoder makes {width}: they do not belong together"
        )
    if len(texts) == 2:
        conditions["encoder_hidden_states_2"] = "G*B", "L", texts["text_encoder_2"].width
    conditions |= _added(unet, texts)
    if unet.get("time_cond_proj_dim"):
        conditions["timestep_cond"] = "G*B", whole(unet, "unet", "time_cond_proj_dim")
    taken, made = (whole(unet, "unet", f"{side}_channels") for side in ("in", "out"))
    if made not in (channels, 2 * channels):
        raise ExportError(
            f"the UNet makes {made} channels of {channels}: it should make as many, or twice as many with a "
            "learned variance"
        )
    if taken == 2 * channels + 1:
        conditions["mask"] = "B", 1, "H", "W"
        conditions["masked_image_latents"] = "B", channels, "H", "W"
    elif taken != channels:
        raise ExportError(
            f"the UNet takes {taken} channels and the autoencoder makes {channels}: known are UNets of "
            f"{channels}, and of {2 * channels + 1} for inpainting"
        )
    return conditions


def _added(unet: Mapping[str, Any], texts: Mapping[str, TextModel]) -> dict[str, Shape]:
    """The pooled text and the sizes of SDXL; empty for others."""
    kind, pooled = unet.get("addition_embed_type"), [text.pooled for text in texts.values() if text.pooled]
    if not kind and not pooled:
        return {}
    if kind != "text_time" or len(pooled) != 1:
        raise ExportError(
            f"the UNet has addition_embed_type {kind!r}, and {len(pooled)} text encoders a pooled vector: "
            "known is 'text_time' with one"
        )
    numbers, rest = divmod(
        whole(unet, "unet", "projection_class_embeddings_input_dim") - pooled[0],
        whole(unet, "unet", "addition_time_embed_dim"),
    )
    if rest or numbers not in (5, 6):
        raise ExportError(
            "projection_class_embeddings_input_dim of the UNet does not leave room for the pooled text of "
            f"{pooled[0]} and 5 or 6 sizes"
        )
    return {"text_embeds": ("G*B", pooled[0]), "time_ids": ("G*B", numbers)}
