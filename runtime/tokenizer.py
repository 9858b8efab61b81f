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

    `ids` is int64 [length]; `truncated` is the end of the prompt that did not fit, "" if all did.
    """

    ids: NDArray[np.int64]
    truncated: str


class Tokenizer:
    """A tokenizer of a bundle, by default that of the first text encoder.

    Gives the ids of transformers' CLIPTokenizer called with padding="max_length" and truncation=True.

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
    def comma(self) -> int | None:
        """The id of a comma at the end of a word, None if the vocabulary has none."""
        found: int | None = self._tokenizer.token_to_id(",</w>")
        return found

    def encode(self, prompt: str) -> Tokens:
        """bos, the first `length - 2` tokens of the prompt, eos, and padding up to `length`.

        Raises RequestError for a string that is not valid Unicode (a lone surrogate).
        """
        found, starts = self.split(prompt)
        room = self.length - 2
        return Tokens(self.pack(found[:room]), "" if len(found) <= room else prompt[starts[room] :])

    def count(self, prompt: str) -> int:
        """How many of the ids of `encode` are not padding."""
        return min(len(self.split(prompt)[0]) + 2, self.length)

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
        """bos, up to `length - 2` ids, eos, and padding up to `length`."""
        spec = self._spec
        packed = np.full(spec.length, spec.pad, np.int64)
        packed[: len(ids) + 2] = [spec.bos, *ids, spec.eos]
        return packed
