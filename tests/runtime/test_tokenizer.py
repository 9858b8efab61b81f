"""Token ids against transformers' own CLIPTokenizer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from allaprima.bundle import Bundle, BundleError, Manifest, RequestError, TokenizerSpec
from allaprima.runtime.tokenizer import Tokenizer

LENGTH = 12
MERGES = ["r e", "re d</w>", "c i", "ci r", "c l", "cl e</w>", "cir cle</w>", "a </w>"]


@pytest.fixture(scope="module")
def reference() -> Any:
    """CLIPTokenizer over a vocabulary of bytes and a few words."""
    transformers = pytest.importorskip("transformers")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(merge.split()) for merge in MERGES if merge != "a </w>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


@pytest.fixture
def tokenizer(reference: Any, manifest: Manifest, tmp_path: Path) -> Tokenizer:
    # With truncation and padding switched on, as a file may come.
    backend = reference.backend_tokenizer
    backend.enable_truncation(5)
    backend.enable_padding(length=7)
    backend.save(str(tmp_path / "tokenizer.json"))
    spec = TokenizerSpec(
        "tokenizer.json", LENGTH, reference.bos_token_id, reference.eos_token_id, reference.pad_token_id
    )
    return Tokenizer(Bundle(tmp_path, replace(manifest, tokenizers={"text_encoder": spec})))


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " ",
        "a red circle",
        "A  Red\n\tcircle ",
        "a red circle above a red square on 12 blue grounds",
        "it's déjà vu, naïve — 東京 🎨🖌️",
        "🎨🖌️🎨🖌️🎨🖌️",
        "exactly10!",
        "red <|endoftext|> circle <|startoftext|>",
        "e\u0301 \u00e9 \u0130 ß ﬁ \u00a0 \u3000x",
        "(red:1.2), [circle] {a|b} <lora:x:1>",
        "\0\x7f",
    ],
)
def test_ids_are_those_of_transformers(tokenizer: Tokenizer, reference: Any, prompt: str) -> None:
    wanted = reference(prompt, padding="max_length", truncation=True, max_length=LENGTH).input_ids
    tokens = tokenizer.encode(prompt)
    assert tokens.ids.dtype == "int64"
    assert tokens.ids.tolist() == wanted


@pytest.mark.parametrize(
    ("prompt", "truncated"),
    [
        ("", ""),
        ("red circle red circle", ""),
        ("red red red red red red red red red red", ""),
        ("red red red red red red red red red red CIRCLE,  Red ", "CIRCLE,  Red "),
        ("RED  red\nred red red red red red red red x🎨", "x🎨"),
        ("🎨🎨🎨🎨", "🎨🎨"),  # 4 tokens each, so the third is cut in the middle
    ],
)
def test_what_was_cut(tokenizer: Tokenizer, prompt: str, truncated: str) -> None:
    assert tokenizer.encode(prompt).truncated == truncated


def test_without_a_beginning(reference: Any, manifest: Manifest, tmp_path: Path) -> None:
    reference.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    spec = TokenizerSpec("tokenizer.json", LENGTH, None, 90, 7)
    tokenizer = Tokenizer(Bundle(tmp_path, replace(manifest, tokenizers={"text_encoder": spec})))
    (red,) = tokenizer.split("red")[0]
    assert tokenizer.room == LENGTH - 1
    assert tokenizer.encode("red").ids.tolist() == [red, 90, *[7] * (LENGTH - 2)]
    assert (tokenizer.encode("red").count, tokenizer.encode("").count) == (2, 1)
    full = tokenizer.encode("red " * (LENGTH - 1) + "circle")
    assert full.ids.tolist() == [red] * (LENGTH - 1) + [90]
    assert (full.count, full.truncated) == (LENGTH, "circle")


def test_text_that_is_not_unicode(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.encode("a \ud800 b")


@pytest.mark.parametrize("content", [None, "", "{}", "no json"])
def test_broken_file(manifest: Manifest, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / manifest.tokenizers["text_encoder"].file
    path.parent.mkdir()
    if content is not None:
        path.write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer(Bundle(tmp_path, manifest))
