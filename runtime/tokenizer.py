"""Prompts to token ids, without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from numpy.typing import NDArray

from allaprima.bundle import Bundle, BundleError, RequestError


@dataclass(frozen=True)
class Tokens:
    """A prompt as the text encoder takes it.

    `ids` is int64 [length], of which the first `count` are not padding; `truncated` is the end of the prompt
    that did not fit, "" if all did.
    """

    ids: NDArray[np.int64]
    truncated: str
    count: int


class Tokenizer:
    """A tokenizer of a bundle, by default that of the first text encoder.

    Gives the ids of transformers' CLIPTokenizer or T5Tokenizer, called with padding="max_length" and
    truncation=True.

    Raises BundleError if the bundle's tokenizer file cannot be read.
    """

    def __init__(self, bundle: Bundle, role: str = "text_encoder") -> None:
        self._spec = bundle.manifest.tokenizers[role]
        path = bundle.path(self._spec.file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{path} is not a tokenizer: {error}. Export the bundle again") from error
        # The file may bring its own; length and padding are the manifest's.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def length(self) -> int:
        """The number of ids that every prompt becomes."""
        return self._spec.length

    @property
    def room(self) -> int:
        """How many tokens of text fit into them."""
        return self._spec.room

    @property
    def comma(self) -> int | None:
        """The id of a comma at the end of a word, None if the vocabulary has none."""
        found: int | None = self._tokenizer.token_to_id(",</w>")
        return found

    def encode(self, prompt: str) -> Tokens:
        """bos if there is one, the first `room` tokens of the prompt, eos, and padding up to `length`.

        Raises RequestError for a string that is not valid Unicode (a lone surrogate).
        """
        found, starts = self.split(prompt)
        kept = found[: self.room]
        truncated = "" if len(found) == len(kept) else prompt[starts[len(kept)] :]
        return Tokens(self.pack(kept), truncated, len(kept) + self.length - self.room)

    def count(self, prompt: str) -> int:
        """How many of the ids of `encode` are not padding."""
        return self.encode(prompt).count

    def split(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text without special tokens, and where each begins in it.

        Places count characters of the text as it was written, before the tokenizer's own normalisation.
        Raises RequestError for a string that is not valid Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the prompt is not valid Unicode text: {error}") from error
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def pack(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """bos if there is one, up to `room` ids, eos, and padding up to `length`."""
        spec = self._spec
        whole = [*([] if spec.bos is None else [spec.bos]), *ids, spec.eos]
        packed = np.full(spec.length, spec.pad, np.int64)
        packed[: len(whole)] = whole
        return packed
