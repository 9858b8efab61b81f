"""Models whose weights stay on disk, made by the libraries' own loading."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from allaprima.bundle import ExportError
from allaprima.export.completeness import check_completeness
from allaprima.export.weights import open_weights

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"
"""What the libraries call a model's weights; those in several files have an index beside them."""

Loaded = tuple[Any, Iterable[str], Iterable[str]]
"""A model, the names of weights that it lacks, and of those that it has no place for."""


def load_model(kind: Any, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a class of diffusers or transformers in `folder`, its weights in `dtype` and on disk.

    The libraries map old names, tie weights and compute buffers, as in their `from_pretrained`.

    Raises:
        ExportError: files that are missing or damaged, or tensors that are not those of the model.
        Exception: whatever the library makes of a wrong configuration.
    """
    import diffusers

    load = _load_diffusers if issubclass(kind, diffusers.ModelMixin) else _load_transformers
    model, missing, unexpected = load(kind, folder, dtype)
    check_completeness(missing, unexpected)
    module: torch.nn.Module = model.eval().requires_grad_(False)
    return module


def _load_diffusers(kind: Any, folder: Path, dtype: torch.dtype) -> Loaded:
    import accelerate

    weights = open_weights(_files(folder, DIFFUSERS))
    with accelerate.init_empty_weights():  # parameters only: buffers are computed
        model = kind.from_config(kind.load_config(folder, local_files_only=True))
    model._fix_state_dict_keys_on_load(weights)
    wide = set(model._keep_in_fp32_modules or ())
    cast = {
        name: weight.to(torch.float32 if wide.intersection(name.split(".")) else dtype)
        for name, weight in weights.items()
    }
    loaded = model.load_state_dict(cast, strict=False, assign=True)
    return model, loaded.missing_keys, loaded.unexpected_keys


def _load_transformers(
    kind: Any, folder: Path, dtype: torch.dtype
) -> tuple[Any, Iterable[str], Iterable[str]]:
    model, report = kind.from_pretrained(
        None,
        config=kind.config_class.from_pretrained(folder, local_files_only=True),
        state_dict=open_weights(_files(folder, TRANSFORMERS)),
        dtype=dtype,
        output_loading_info=True,
    )
    return model, report["missing_keys"], report["unexpected_keys"]


def _files(folder: Path, name: str) -> list[Path]:
    """The one file of the weights, or all that the index names."""
    index = folder / f"{name}.index.json"
    if (folder / name).is_file() or not index.is_file():
        return [folder / name]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as cause:
        raise ExportError(f"{index.name} is not usable: {type(cause).__name__}") from cause
    if outside := [each for each in names if not isinstance(each, str) or Path(each).name != each]:
        raise ExportError(f"{index.name} names {outside[0]!r}, which is no file beside it")
    return [folder / each for each in sorted(names)]
