"""Prompts to token ids, without transformers."""

from __future__ import annotations

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
    """The tokenizer of a bundle.

    Gives the ids of transformers' CLIPTokenizer called with padding="max_length" and truncation=True.

    Raises BundleError if the bundle's tokenizer file cannot be read.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._spec = bundle.manifest.tokenizer
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

    def encode(self, prompt: str) -> Tokens:
        """bos, the first `length - 2` tokens of the prompt, eos, and padding up to `length`.

        Raises RequestError for a string that is not valid Unicode (a lone surrogate).
        """
        spec = self._spec
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the prompt is not valid Unicode text: {error}") from error
        encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
        room = spec.length - 2
        kept = encoding.ids[:room]
        ids = np.full(spec.length, spec.pad, np.int64)
        ids[: len(kept) + 2] = [spec.bos, *kept, spec.eos]
        fits = len(encoding.ids) <= room
        # Offsets count characters of the prompt as it was written, before the tokenizer's own normalisation.
        return Tokens(ids, "" if fits else prompt[encoding.offsets[room][0] :])
