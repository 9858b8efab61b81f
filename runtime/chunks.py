"""From a prompt to what the text encoder takes: chunks of one length, with the weights of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allaprima.runtime.prompts import Span, parse_weights, split_breaks
from allaprima.runtime.tokenizer import Tokenizer

BACKTRACK = 20
"""A chunk ends at its last comma if that is among its last BACKTRACK tokens, as in the web interfaces."""

_Token = tuple[int, float]
"""An id and its weight."""


@dataclass(frozen=True)
class Chunk:
    """One input of the text encoder: `ids` int64 [L], and `weights` float32 [L], None if all are 1.

    The first `count` ids are not padding; None is for encoders that read padding as any other text.
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None
    count: int | None = None

    @property
    def filled(self) -> int:
        """How many of the ids the text encoder attends to."""
        return len(self.ids) if self.count is None else self.count


@dataclass(frozen=True)
class Chunks:
    """A prompt as at least one chunk; `truncated` is the end that did not fit, "" if all did."""

    chunks: tuple[Chunk, ...]
    truncated: str = ""


def make_chunks(tokenizer: Tokenizer, prompt: str, *, long: bool = False, weighted: bool = False) -> Chunks:
    """A prompt in one chunk, the rest cut off, or with `long` in as many as it takes.

    A full chunk ends at its last comma if that is among its last BACKTRACK tokens; the word BREAK starts a
    new one. `weighted` reads the syntax of `parse_weights`. Raises RequestError for text that is not valid
    Unicode.
    """
    if not long and not weighted:
        tokens = tokenizer.encode(prompt)
        return Chunks((Chunk(tokens.ids),), tokens.truncated)
    spans = parse_weights(prompt) if weighted else (Span(prompt),)
    if long:
        return Chunks(tuple(_pack(tokenizer, part) for part in _divide(tokenizer, spans)))
    return _cut(tokenizer, spans)


def pad_chunks(tokenizer: Tokenizer, prompts: Sequence[Chunks], count: int) -> tuple[tuple[Chunk, ...], ...]:
    """The chunks of every prompt, made `count` with empty ones."""
    empty = _pack(tokenizer, [])
    return tuple(prompt.chunks + (empty,) * (count - len(prompt.chunks)) for prompt in prompts)


def apply_weights(states: NDArray[np.float32], weights: NDArray[np.float32]) -> None:
    """Multiply hidden states [L,D] by the weights [L] of their tokens in place, then restore their mean.

    The mean is that of the chunk. It stays as it comes out where it cannot be restored, because it is 0.
    """
    before = states.mean(dtype=np.float64)
    states *= weights[:, None]
    after = states.mean(dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.float32(before / after)
    if np.isfinite(ratio):
        states *= ratio


def _cut(tokenizer: Tokenizer, spans: Sequence[Span]) -> Chunks:
    room = tokenizer.room
    kept: list[_Token] = []
    for index, span in enumerate(spans):
        ids, starts = tokenizer.split(span.text)
        fits = room - len(kept)
        kept += [(id, span.weight) for id in ids[:fits]]
        if len(ids) > fits:
            rest = "".join(later.text for later in spans[index + 1 :])
            return Chunks((_pack(tokenizer, kept),), span.text[starts[fits] :] + rest)
    return Chunks((_pack(tokenizer, kept),))


def _divide(tokenizer: Tokenizer, spans: Sequence[Span]) -> list[list[_Token]]:
    """The tokens of every chunk. A break after a break makes an empty chunk, one at the very end does not."""
    parts = list(_sections(tokenizer, spans))
    if len(parts) > 1 and not parts[-1]:
        del parts[-1]
    return [chunk for part in parts for chunk in _fill(part, tokenizer.room, tokenizer.comma)]


def _sections(tokenizer: Tokenizer, spans: Sequence[Span]) -> Iterator[list[_Token]]:
    """The tokens between breaks."""
    section: list[_Token] = []
    for span in spans:
        for index, text in enumerate(split_breaks(span.text)):
            if index:
                yield section
                section = []
            section += [(id, span.weight) for id in tokenizer.split(text)[0]]
    yield section


def _fill(section: list[_Token], room: int, comma: int | None) -> list[list[_Token]]:
    """At least one chunk of up to `room` tokens."""
    chunks = []
    start, last = 0, -1
    for position, (id, _) in enumerate(section):
        full = position - start == room
        if id == comma:
            last = position
        elif full and last >= start and position - last <= BACKTRACK:
            chunks.append(section[start : last + 1])
            start, full = last + 1, False
        if full:
            chunks.append(section[start:position])
            start = position
    return [*chunks, section[start:]]


def _pack(tokenizer: Tokenizer, tokens: Sequence[_Token]) -> Chunk:
    ids = tokenizer.pack([id for id, _ in tokens])
    if all(weight == 1 for _, weight in tokens):
        return Chunk(ids)
    weights = np.ones(len(ids), np.float32)
    weights[1 : 1 + len(tokens)] = [weight for _, weight in tokens]
    return Chunk(ids, weights)
