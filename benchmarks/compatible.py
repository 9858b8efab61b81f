"""A checkpoint as older libraries read it: the names and files that transformers 5 no longer writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CLIP_TOKENS = 49408
"""The size of CLIP's own vocabulary, which some libraries bring with them."""
PREFIX = "text_model."


def write_compatible(checkpoint: Path, folder: Path) -> None:
    """Write the checkpoint again: large files as links, text encoders and tokenizers in the old form.

    Needs safetensors and torch.
    """
    for source in sorted(checkpoint.resolve().rglob("*")):
        target = folder / source.relative_to(checkpoint.resolve())
        if source.is_dir():
            target.mkdir(exist_ok=True)
        elif source.suffix == ".safetensors" and source.parent.name.startswith("text_encoder"):
            _write_weights(source, target)
        elif source.suffix == ".safetensors":
            target.symlink_to(source)
        else:
            shutil.copyfile(source, target)
    for tokenizer in sorted(folder.glob("tokenizer*/tokenizer.json")):
        _write_vocabulary(tokenizer)


def _write_weights(source: Path, target: Path) -> None:
    """Names begin with "text_model." but for those of a projection, which is no part of it."""
    from safetensors.torch import load_file, save_file

    weights: dict[str, Any] = load_file(source)
    renamed = {
        name if name.startswith((PREFIX, "text_projection.")) else PREFIX + name: value
        for name, value in weights.items()
    }
    save_file(renamed, target, metadata={"format": "pt"})


def _write_vocabulary(tokenizer: Path) -> None:
    """vocab.json and merges.txt out of tokenizer.json."""
    model = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokenizer.with_name("vocab.json").write_text(vocabulary, encoding="utf-8")
    tokenizer.with_name("merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")


def has_clip_tokens(checkpoint: Path) -> bool:
    """Whether the first tokenizer is CLIP's own, as far as its size tells."""
    folder = checkpoint / "tokenizer"
    try:
        if (folder / "vocab.json").is_file():
            return len(json.loads((folder / "vocab.json").read_text(encoding="utf-8"))) == CLIP_TOKENS
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        return len(model["vocab"]) == CLIP_TOKENS
    except (OSError, ValueError, LookupError):
        return False
