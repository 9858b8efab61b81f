"""What a checkpoint's configuration files say, checked: numbers, scheduler, tokenizers, defaults."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allaprima.bundle import Defaults, ExportError, Latent, TokenizerSpec
from allaprima.export.reason import reason
from allaprima.export.source import Checkpoint


def whole(config: Mapping[str, Any], part: str, field: str) -> int:
    """A positive number of a part's config.json. Raises ExportError."""
    value = config.get(field)
    if type(value) is not int or value < 1:
        raise ExportError(f"{field} in the config.json of {part} should be a positive number, not {value!r}")
    return value


def levels(config: Mapping[str, Any], part: str) -> int:
    """The number of levels of a UNet or an autoencoder. Raises ExportError."""
    value = config.get("block_out_channels")
    if not (isinstance(value, list) and value):
        raise ExportError(f"block_out_channels in the config.json of {part} should be a list, not {value!r}")
    return len(value)


def read_scheduler(checkpoint: Checkpoint, forced: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's full configuration, with what its pipeline changes in it. Raises ExportError."""
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
    defaulted = [field for field in config.get("_use_default_values", []) if field not in forced]
    return {"_class_name": name, **config, **forced, "_use_default_values": defaulted}


def read_tokenizer(checkpoint: Checkpoint, part: str, length: int, *, bos: bool = True) -> TokenizerSpec:
    """What to know of the tokenizer in a folder, for an encoder of `length` positions.

    `bos`: prompts begin with a token for that. Raises ExportError.
    """
    tokenizer = _load_tokenizer(checkpoint, part)
    needed = ("bos", "eos", "pad") if bos else ("eos", "pad")
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in needed}
    if None in ids.values():
        raise ExportError(
            f"the {part} lacks {'a beginning, ' * bos}an end or a padding token: it is incomplete"
        )
    length = min(length, tokenizer.model_max_length)
    return TokenizerSpec(f"{part}/tokenizer.json", length, **{"bos": None, **ids})


def write_tokenizer(checkpoint: Checkpoint, part: str, path: Path) -> None:
    """Write a tokenizer as one file of the `tokenizers` library; ExportError if the disk refuses."""
    tokenizer = _load_tokenizer(checkpoint, part).backend_tokenizer
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(path))
    except Exception as cause:  # the library has no error class of its own
        raise ExportError(f"{path} cannot be written: {reason(cause)}") from cause


def _load_tokenizer(checkpoint: Checkpoint, part: str) -> Any:
    from transformers import CLIPTokenizer, T5Tokenizer

    kind: Any = CLIPTokenizer
    if checkpoint.has(part) and checkpoint.kind(part).startswith("T5"):
        kind = T5Tokenizer
        _check_sentencepiece(checkpoint.place(part))
    try:
        return kind.from_pretrained(checkpoint.place(part), local_files_only=True)
    except Exception as cause:
        raise ExportError(
            f"the tokenizer in '{checkpoint.place(part)}' cannot be loaded: {reason(cause)}"
        ) from cause


def _check_sentencepiece(folder: Path) -> None:
    """ExportError where a tokenizer must be converted and the library that can is not installed."""
    alone = (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file()
    if alone and importlib.util.find_spec("sentencepiece") is None:
        raise ExportError(
            f"the tokenizer in '{folder}' is a SentencePiece model (spiece.model), and sentencepiece, which "
            "converts it, is not installed: pip install sentencepiece"
        )


def read_defaults(
    checkpoint: Checkpoint, unet: Mapping[str, Any], latent: Latent, steps: int, guidance_scale: float
) -> Defaults:
    """The trained size; steps and guidance from generation_config.json, or else these."""
    size = unet.get("sample_size") or 64
    chosen: Mapping[str, Any] = {}
    if (checkpoint.folder / "generation_config.json").is_file():
        chosen = checkpoint.config(".", "generation_config.json")
    try:
        height, width = size if isinstance(size, list) else (size, size)
        return Defaults(
            height=int(height) * latent.downscale,
            width=int(width) * latent.downscale,
            num_inference_steps=int(chosen.get("num_inference_steps", steps)),
            guidance_scale=float(chosen.get("guidance_scale", guidance_scale)),
        )
    except (TypeError, ValueError) as cause:
        raise ExportError(
            f"the checkpoint's defaults (generation_config.json) are not usable: {reason(cause)}"
        ) from cause
