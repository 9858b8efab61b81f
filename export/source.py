"""Reading a checkpoint: a diffusers folder, or a hub id where there is a network."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allaprima.bundle import ExportError
from allaprima.export.loading import load_model
from allaprima.export.reason import reason

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
INDEX = "model_index.json"
_PARTS = (
    *("feature_extractor", "safety_checker", "scheduler", "text_encoder", "text_encoder_2", "tokenizer"),
    *("tokenizer_2", "unet", "vae", "movq", "prior", "image_encoder", "image_processor"),
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened diffusers folder. `index` is its model_index.json.

    `prefix` stands before the names of all parts: a pipeline that is made of two may keep them in one folder.
    """

    folder: Path
    index: dict[str, Any]
    prefix: str = ""

    @property
    def pipeline(self) -> str:
        """The pipeline class that the checkpoint names."""
        return str(self.index["_class_name"])

    def has(self, part: str) -> bool:
        """Whether the index names a class for a part: [null, null] is none."""
        entry = self.index.get(self.prefix + part)
        return isinstance(entry, list) and entry != [None, None]

    def kind(self, part: str) -> str:
        """The class that the index names for a part; ExportError if it names none."""
        part = self.prefix + part
        entry = self.index.get(part)
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
            raise ExportError(f"'{self.folder / INDEX}' names no class for the {part}: it is incomplete")
        return entry[1]

    def place(self, part: str) -> Path:
        """The folder of one part."""
        return self.folder / (self.prefix + part)

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """The configuration file of one part, as it is."""
        return _read_json(self.place(part) / file)

    def check(self, part: str) -> Any:
        """The class of a part's model, before anything of it is loaded.

        Raises:
            ExportError: a class this exporter does not know, or weights that are missing or pickled.
        """
        kind = _model_class(part, self.kind(part))
        _require_safetensors(self.place(part))
        return kind

    def load(self, part: str, dtype: torch.dtype) -> torch.nn.Module:
        """The model of one part in `dtype`, ready to trace; its weights stay on disk (see `StoredTensor`).

        Raises:
            ExportError: as `check`, or files that are broken, or tensors that are not those of the model.
        """
        kind, folder = self.check(part), self.place(part)
        try:
            with _silent():
                return load_model(kind, folder, dtype)
        except Exception as cause:
            raise ExportError(f"{folder} cannot be loaded as {kind.__name__}: {reason(cause)}") from cause


def open_checkpoint(source: str) -> Checkpoint:
    """Open a folder, or download a hub id into the hub's cache.

    Raises:
        ExportError: no such folder or id, no model_index.json in it, or one that cannot be read.
    """
    if not source.strip():
        raise ExportError(
            "the checkpoint path is empty: name a diffusers folder or a hub id such as owner/model"
        )
    folder = Path(source).expanduser()
    if not folder.exists() and _HUB_ID.fullmatch(source):
        folder = _download(source)
    if not folder.is_dir():
        raise ExportError(
            f"'{source}' does not exist: name a diffusers folder or a hub id such as owner/model"
        )
    if not (folder / INDEX).is_file():
        raise ExportError(f"'{source}' is not a diffusers checkpoint: it has no {INDEX}")
    index = _read_json(folder / INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise ExportError(f"'{folder / INDEX}' names no pipeline class (_class_name)")
    return Checkpoint(folder, index)


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download

    # Only what is read: a repository may also hold the same weights in other precisions and as one file.
    wanted = [f"{part}/*.{suffix}" for part in _PARTS for suffix in ("json", "txt", "model", "safetensors")]
    unwanted = ["*.fp16*", "*.bf16*", "*.non_ema*"]
    try:
        return Path(
            snapshot_download(
                source, allow_patterns=[INDEX, "generation_config.json", *wanted], ignore_patterns=unwanted
            )
        )
    except Exception as cause:
        raise ExportError(
            f"'{source}' is no folder here and cannot be downloaded as a hub id "
            f"({type(cause).__name__}): check the spelling and the network"
        ) from cause


def _model_class(part: str, name: str) -> Any:
    """The class of a part, if it is one of those that the exporter knows."""
    import diffusers
    import transformers
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    known = {
        ("text_encoder", "CLIPTextModel"): transformers.CLIPTextModel,
        ("text_encoder", "CLIPTextModelWithProjection"): transformers.CLIPTextModelWithProjection,
        ("text_encoder", "T5EncoderModel"): transformers.T5EncoderModel,
        ("text_encoder_2", "CLIPTextModelWithProjection"): transformers.CLIPTextModelWithProjection,
        ("image_encoder", "CLIPVisionModelWithProjection"): transformers.CLIPVisionModelWithProjection,
        ("prior", "PriorTransformer"): diffusers.PriorTransformer,
        ("unet", "UNet2DConditionModel"): diffusers.UNet2DConditionModel,
        ("unet", "Kandinsky3UNet"): diffusers.Kandinsky3UNet,
        ("vae", "AutoencoderKL"): diffusers.AutoencoderKL,
        ("movq", "VQModel"): diffusers.VQModel,
        ("safety_checker", "StableDiffusionSafetyChecker"): StableDiffusionSafetyChecker,
    }
    if (part, name) not in known:
        wanted = ", ".join(kind for place, kind in known if place == part)
        raise ExportError(f"the checkpoint's {part} is of class {name}: this exporter knows {wanted}")
    return known[part, name]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The libraries' own progress bars and advice off: the exporter reports its stages itself."""
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log

    libraries = (diffusers_log, transformers_log)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def _require_safetensors(folder: Path) -> None:
    if not folder.is_dir():
        raise ExportError(f"the checkpoint has no folder '{folder.name}': it is incomplete")
    suffixes = {file.suffix for file in folder.iterdir()}
    if ".safetensors" in suffixes:
        return
    if suffixes & {".bin", ".ckpt", ".pt", ".pth"}:
        raise ExportError(
            f"'{folder}' holds pickled weights, which can run code: convert them to safetensors"
        )
    raise ExportError(f"'{folder}' holds no safetensors weights: the checkpoint is incomplete")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise ExportError(f"'{path}' cannot be read: {cause.strerror}") from cause
    except ValueError as cause:
        raise ExportError(f"'{path}' is not JSON: {reason(cause)}") from cause
    if not isinstance(value, dict):
        raise ExportError(f"'{path}' is not a JSON object")
    return value
