"""A checkpoint as older libraries read it."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from allaprima.benchmarks.checkpoints import SHAPES
from allaprima.benchmarks.compatible import CLIP_TOKENS, has_clip_tokens, write_compatible


@pytest.fixture(scope="module")
def compatible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shapes` written again."""
    folder = tmp_path_factory.mktemp("compatible")
    write_compatible(SHAPES, folder)
    return folder


def test_it_is_whole(compatible: Path) -> None:
    there = {path.relative_to(SHAPES) for path in SHAPES.rglob("*")}
    assert there <= {path.relative_to(compatible) for path in compatible.rglob("*")}
    assert (compatible / "unet" / "diffusion_pytorch_model.safetensors").is_symlink()


def test_text_encoders_have_their_old_names(compatible: Path) -> None:
    file = Path("text_encoder") / "model.safetensors"
    before, after = load_file(SHAPES / file), load_file(compatible / file)
    assert {f"text_model.{name}" for name in before} == set(after)
    assert all(bool((after[f"text_model.{name}"] == value).all()) for name, value in before.items())


def test_old_names_and_projections_stay(tmp_path: Path, compatible: Path) -> None:
    write_compatible(compatible, tmp_path)
    file = Path("text_encoder") / "model.safetensors"
    assert set(load_file(tmp_path / file)) == set(load_file(compatible / file))


def test_the_vocabulary_is_that_of_the_tokenizer(compatible: Path) -> None:
    folder = compatible / "tokenizer"
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").rename(folder / "elsewhere")
    try:
        old, new = CLIPTokenizer.from_pretrained(folder), CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")
        text = "a red circle above a blue square, on 3 grounds"
        assert old(text)["input_ids"] == new(text)["input_ids"]
    finally:
        (folder / "elsewhere").rename(folder / "tokenizer.json")
    assert json.loads((folder / "vocab.json").read_text()) == model["vocab"]


def test_whose_tokens_they_are(tmp_path: Path) -> None:
    assert not has_clip_tokens(SHAPES)
    assert not has_clip_tokens(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    words = {str(number): number for number in range(CLIP_TOKENS)}
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    assert has_clip_tokens(tmp_path)
