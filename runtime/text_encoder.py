"""Prompts to hidden states."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from allaprima.bundle import BundleError
from allaprima.runtime.chunks import Chunk, apply_weights
from allaprima.runtime.embeddings import EmbeddingCache, Key
from allaprima.runtime.memory import Block, Tensor
from allaprima.runtime.session import Binding, Session
from allaprima.runtime.stages import POOLED
from allaprima.runtime.tokenizer import Tokenizer

_NUMBERS = itertools.count()
"""Tell encoders that share a cache apart."""


class Encoded(NamedTuple):
    """What a text encoder makes of N chunks, in its session's memory."""

    states: Tensor
    """Hidden states [N,L,D]."""
    pooled: Tensor | None
    """The texts' vectors [N,D'], if the graph has them."""
    block: Block
    """Where both lie."""
    pulled: bool
    """Whether the arrays hold them already."""

    def pull(self) -> None:
        """Bring them into their arrays."""
        if not self.pulled:
            self.block.pull()


class TextEncoder:
    """Prompts to hidden states, of which those that were seen before come from a cache, if there is one."""

    def __init__(self, session: Session, tokenizer: Tokenizer, cache: EmbeddingCache | None = None) -> None:
        """Several encoders may share a cache.

        Raises BundleError if the manifest does not say how wide a hidden state is.
        """
        width = session.outputs["last_hidden_state"].shape[-1]
        if not isinstance(width, int):
            raise BundleError(f"last_hidden_state of a text encoder should end in a number, not '{width}'")
        self.tokenizer = tokenizer
        self.condition = tokenizer.length, width
        """The shape [L,D] of one chunk's hidden states."""
        self._session = session
        self._number = next(_NUMBERS)
        self._cache = EmbeddingCache(0) if cache is None else cache
        self._blocks: dict[int, tuple[Block, Block]] = {}
        self._bindings: dict[int, Binding] = {}
        spec = session.inputs.get("layer_weights")
        self._states = None if spec is None else int(spec.shape[1])

    @property
    def layers(self) -> int | None:
        """The number of layers, up to which `encode` can skip; None if the graph was exported without."""
        return None if self._states is None else self._states - 1

    def encode(self, chunks: Sequence[Chunk], skips: Sequence[int]) -> Encoded:
        """Hidden states of chunks, weighted; valid until the next call.

        `skips` are the last layers to leave out for each chunk; all 0 if `layers` is None. Raises
        BackendError.
        """
        given, made = self._allocate(len(chunks))
        given.tensors["input_ids"].array[...] = [chunk.ids for chunk in chunks]
        if "attention_mask" in given.tensors:
            places = np.arange(self.tokenizer.length)
            given.tensors["attention_mask"].array[...] = [places < chunk.filled for chunk in chunks]
        if self._states is not None:
            layer_weights = given.tensors["layer_weights"].array
            layer_weights[...] = 0
            layer_weights[range(len(skips)), [self._states - 1 - skip for skip in skips]] = 1
        key = self._key(given, chunks)
        known = self._cache.get(key)
        if known is None:
            self._run(given, made, chunks)
            if self._cache.capacity:
                made.pull()
                self._cache.put(key, {name: tensor.array for name, tensor in made.tensors.items()})
        else:
            for name, array in known.items():
                made.tensors[name].array[...] = array
            made.push()
        states, pooled = made.tensors["last_hidden_state"], made.tensors.get(POOLED)
        return Encoded(states, pooled, made, pulled=bool(self._cache.capacity))

    def close(self) -> None:
        """Drop all bindings; the session is the caller's to close."""
        self._bindings.clear()
        self._blocks.clear()

    def _key(self, given: Block, chunks: Sequence[Chunk]) -> Key:
        """All that the outcome depends on: whatever the graph is given, and the weights."""
        inputs = (tensor.array.tobytes() for tensor in given.tensors.values())
        weights = (None if chunk.weights is None else chunk.weights.tobytes() for chunk in chunks)
        return (self._number, *inputs, *weights)

    def _run(self, given: Block, made: Block, chunks: Sequence[Chunk]) -> None:
        count = len(chunks)
        if count not in self._bindings:
            self._bindings[count] = self._session.bind({**given.tensors, **made.tensors})
        given.push()
        self._bindings[count].run()
        if all(chunk.weights is None for chunk in chunks):
            return
        made.pull()
        for states, chunk in zip(made.tensors["last_hidden_state"].array, chunks, strict=True):
            if chunk.weights is not None:
                apply_weights(states, chunk.weights)
        made.push()

    def _allocate(self, count: int) -> tuple[Block, Block]:
        """Inputs and outputs for this many chunks. Known texts need no more than these."""
        if count not in self._blocks:
            given, made = (
                self._session.memory.allocate(
                    {name: (spec.resolve({"B": count}), spec.dtype) for name, spec in specs.items()}
                )
                for specs in (self._session.inputs, self._session.outputs)
            )
            self._blocks[count] = given, made
        return self._blocks[count]
