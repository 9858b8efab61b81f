"""Single-file checkpoints in the original layout of Stable Diffusion: unpacked to a diffusers folder.

The file holds weights alone, which stay on disk: they are mapped, and written part by part.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allaprima.bundle import ExportError
from allaprima.export.layouts import Text, Weights, find_release, read_index, read_scheduler
from allaprima.export.networks import check_addition, read_text, read_unet, read_vae
from allaprima.export.reason import reason
from allaprima.export.renaming import listed, rename_text, rename_unet, rename_vae
from allaprima.export.weights import open_weights, write_weights

HUB_TOKENIZER = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class SingleFile:
    """What the one who exports a single file says about it.

    Args:
        tokenizer: a folder or hub id with CLIP's vocabulary, which the file lacks; None is CLIP's on the hub.
        prediction: "epsilon" or "v_prediction"; None is the file's if it tells, or else the family's: v
            prediction for 2.x.
        allow_pickle: open a `.ckpt`, which could hold code, with torch's loader for weights alone.
    """

    tokenizer: str | None = None
    prediction: str | None = None
    allow_pickle: bool = False


def unpack(file: Path, folder: Path, about: SingleFile) -> None:
    """Write the diffusers folder of a file of Stable Diffusion 1.x, 2.x, XL or XL's refiner.

    The averaged (EMA) weights are taken if it has them. On an error what is in the folder is worth nothing.

    Raises:
        ExportError: it is no such checkpoint, another family's, or has tensors missing or too many, or the
            disk has no room for it.
    """
    weights = read_weights(file, pickle=about.allow_pickle)
    release = find_release(file, weights)
    with _named(file):
        unet, vae = read_unet(weights, release), read_vae(weights, release)
    _check_room(file, folder, weights)
    for text in release.texts:
        with _named(file, text.part):
            tensors = rename_text(weights, text)
            config = read_text(tensors, text)
            if text.pooled:
                check_addition(unet, config["projection_dim"], release)
        _write_tokenizer(about.tokenizer, text, config["vocab_size"], folder / text.tokenizer)
        _write_part(file, folder / text.part, config, tensors)
    for part, config, rename in (("vae", vae, rename_vae), ("unet", unet, rename_unet)):
        with _named(file, part):
            tensors = rename(weights, config)
        _write_part(file, folder / part, config, tensors)
    scheduler = read_scheduler(release, weights, about.prediction)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "model_index.json", read_index(release, unet, scheduler))


@contextmanager
def _named(file: Path, part: str = "") -> Iterator[None]:
    """Errors name the file, and strange ones the part whose tensors led to them."""
    try:
        yield
    except ExportError as error:
        raise ExportError(f"'{file}': {error}") from error
    except Exception as cause:
        what = f"the tensors of the {part}" if part else "its tensors"
        raise ExportError(f"'{file}': {what} are not usable: {reason(cause)}") from cause


def read_weights(file: Path, *, pickle: bool) -> Weights:
    """All tensors of a file by name, on disk where the format allows. Raises ExportError."""
    if file.suffix == ".safetensors":
        return open_weights([file])
    if file.suffix not in (".ckpt", ".pt", ".pth"):
        raise ExportError(f"'{file}' is neither a .safetensors nor a .ckpt file")
    if not pickle:
        raise ExportError(
            f"'{file}' is a pickle, a format that can carry code: get the .safetensors of the same model, "
            "or, if you trust where it comes from, add --allow-pickle, which reads tensors and nothing else"
        )
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as cause:
        raise ExportError(
            f"'{file}' holds more than tensors, or is damaged, and was not opened: {reason(cause)}"
        ) from cause
    while isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise ExportError(f"'{file}' holds no tensors by name")
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _check_room(file: Path, folder: Path, weights: Weights) -> None:
    """ExportError unless the disk of the folder has room for what will be written there."""
    needed = sum(value.nbytes for name, value in weights.items() if not name.startswith("model_ema."))
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ExportError(
            f"unpacking '{file}' needs {needed / 1e9:.1f} GB for a while in '{place}', "
            f"which has {free / 1e9:.1f} GB left: make room"
        )


def _empty(config: Mapping[str, Any]) -> Any:
    """The model of a configuration without memory for its weights."""
    import diffusers
    import transformers

    with torch.device("meta"):
        if "architectures" in config:
            kind = getattr(transformers, config["architectures"][0])
            return kind(transformers.CLIPTextConfig(**config))
        return getattr(diffusers, config["_class_name"]).from_config(dict(config))


def _fit(part: str, config: Mapping[str, Any], tensors: Weights) -> Weights:
    """The tensors under the very names of the model; ExportError unless they are just its own."""
    wanted = {name: value.shape for name, value in _empty(config).state_dict().items()}
    if any(name.startswith("text_model.") for name in wanted):  # not so with every class and version
        tensors = {name if name in wanted else f"text_model.{name}": tensors[name] for name in tensors}
    misshapen = [name for name in wanted.keys() & tensors.keys() if wanted[name] != tensors[name].shape]
    for names, what in (
        (wanted.keys() - tensors.keys(), "lacks"),
        (tensors.keys() - wanted.keys(), "has too many:"),
        (misshapen, "has of another shape"),
    ):
        if names:
            raise ExportError(f"the {part} {what} {listed(names)}")
    return tensors


def _write_part(file: Path, folder: Path, config: Mapping[str, Any], tensors: Weights) -> None:
    with _named(file, folder.name):
        tensors = {name: value.contiguous() for name, value in _fit(folder.name, config, tensors).items()}
    path = folder / f"{'model' if 'architectures' in config else 'diffusion_pytorch_model'}.safetensors"
    try:
        folder.mkdir(parents=True)
        write_weights(tensors, path)
        _write_json(folder / "config.json", config)
    except OSError as cause:
        raise ExportError(f"'{path}' cannot be written: {reason(cause)}") from cause


def _write_tokenizer(source: str | None, text: Text, vocabulary: int, folder: Path) -> None:
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(source or HUB_TOKENIZER, pad_token=text.pad)
    except Exception as cause:
        raise ExportError(
            f"a single file has no vocabulary, and that of '{source or HUB_TOKENIZER}' cannot be loaded "
            f"({type(cause).__name__}): name a folder with CLIP's tokenizer, --tokenizer"
        ) from cause
    if len(tokenizer) != vocabulary:
        raise ExportError(
            f"the vocabulary of '{source or HUB_TOKENIZER}' has {len(tokenizer)} tokens, that of the "
            f"{text.part} {vocabulary}: name the folder of the tokenizer that belongs to it, --tokenizer"
        )
    tokenizer.save_pretrained(folder)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
