"""Weights that are not those of their model are named, where the libraries would make some up."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allaprima.bundle import ExportError
from allaprima.export.completeness import check_completeness
from allaprima.export.source import open_checkpoint

Weights = dict[str, torch.Tensor]


@pytest.fixture(params=["text_encoder", "unet", "vae"])
def part(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path: Path) -> tuple[Path, Weights]:
    """The file of one part's weights in a copy of the tiny checkpoint, and what is in it."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy") / request.param
    (file,) = folder.glob("*.safetensors")
    return file, load_file(file)


def load(file: Path, weights: Weights) -> torch.nn.Module:
    save_file(weights, file, metadata={"format": "pt"})
    return open_checkpoint(str(file.parents[1])).load(file.parent.name, torch.float32)


def test_missing_tensors(part: tuple[Path, Weights]) -> None:
    file, weights = part
    lost = sorted(weights)[2]
    with pytest.raises(ExportError, match=f"it lacks {lost}") as caught:
        load(file, {name: value for name, value in weights.items() if name != lost})
    assert "\n" not in str(caught.value)


def test_tensors_of_something_else(part: tuple[Path, Weights]) -> None:
    file, weights = part
    with pytest.raises(ExportError, match=r"it has no place for stray\.weight"):
        load(file, {**weights, "stray.weight": torch.zeros(2)})


def test_many_of_both_and_harmless_ones() -> None:
    check_completeness([], ["text_model.embeddings.position_ids"])
    with pytest.raises(
        ExportError, match="it lacks a, b, c and 2 more; it has no place for z; get the folder"
    ):
        check_completeness("edcba", ["z", "embeddings.position_ids"])
