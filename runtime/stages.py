"""The stages of painting: each a session with its buffers, allocated once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from allaprima.bundle import BundleError, Latent
from allaprima.runtime.samplers import Table, idle_row
from allaprima.runtime.session import Binding, Session
from allaprima.runtime.tokenizer import Tokenizer

Floats = NDArray[np.float32]


class TextEncoder:
    """Prompts to hidden states."""

    def __init__(self, session: Session, tokenizer: Tokenizer) -> None:
        """Raises BundleError if the manifest does not say how wide a hidden state is."""
        width = session.outputs["last_hidden_state"].shape[-1]
        if not isinstance(width, int):
            raise BundleError(f"last_hidden_state of text_encoder should end in a number, not '{width}'")
        self._session = session
        self._tokenizer = tokenizer
        self._bound: dict[int, tuple[NDArray[np.int64], Floats, Binding]] = {}
        self.condition = tokenizer.length, width
        """The shape [L,D] of one prompt's hidden states."""

    def encode(self, prompts: Sequence[str]) -> tuple[Floats, tuple[str, ...]]:
        """Hidden states [len(prompts),L,D], valid until the next call, and of each prompt what was cut off.

        Raises RequestError for text that is not valid Unicode, or BackendError.
        """
        tokens = [self._tokenizer.encode(prompt) for prompt in prompts]
        ids, hidden, binding = self._bind(len(prompts))
        ids[...] = [each.ids for each in tokens]
        binding.run()
        return hidden, tuple(each.truncated for each in tokens)

    def close(self) -> None:
        """Drop all bindings; the session is the caller's to close."""
        self._bound.clear()

    def _bind(self, count: int) -> tuple[NDArray[np.int64], Floats, Binding]:
        if count not in self._bound:
            ids, hidden = np.zeros((count, self.condition[0]), np.int64), _zeros(count, *self.condition)
            binding = self._session.bind({"input_ids": ids, "last_hidden_state": hidden})
            self._bound[count] = ids, hidden, binding
        return self._bound[count]


class Decoder:
    """Latents of one size to pixels, one picture at a time: decoding takes the most memory of all stages."""

    def __init__(self, session: Session, latent: Latent, height: int, width: int) -> None:
        """Allocate for pictures of `height` x `width` pixels."""
        self._sample = _zeros(1, latent.channels, height // latent.downscale, width // latent.downscale)
        self._image = np.zeros((1, height, width, 3), np.uint8)
        self._binding = session.bind({"sample": self._sample, "image": self._image})

    def decode(self, sample: Floats) -> NDArray[np.uint8]:
        """The pixels [height,width,3] of a sample [C,H,W], valid until the next call. Raises BackendError."""
        self._sample[0] = sample
        self._binding.run()
        image: NDArray[np.uint8] = self._image[0]
        return image


class Denoiser:
    """A batch of B lanes, each of which may be at another row of another sampler's table.

    Sample and history exist twice. One binding reads the first pair and writes the second, the other does
    the reverse, so a step is one run of one of them and nothing is ever copied. All other inputs are arrays
    to write into between steps; they keep their contents.

    Attributes:
        noise: [B,C,H,W], this step's noise.
        guidance: [G,B], the weights of the branches.
        conditions: [G,B,L,D], hidden states of the prompts by branch and lane.
    """

    def __init__(
        self,
        session: Session,
        sample: tuple[int, int, int, int],
        *,
        branches: int,
        history: int,
        condition: tuple[int, int],
    ) -> None:
        """Allocate for `sample` [B,C,H,W], G `branches`, S `history` slots, a `condition` [L,D] per prompt.

        All lanes are idle at first. Raises BackendError if the session's graph has other shapes.
        """
        lanes = sample[0]
        self._samples = _zeros(*sample), _zeros(*sample)
        self._histories = _zeros(history, *sample), _zeros(history, *sample)
        self.noise = _zeros(*sample)
        self._timestep = _zeros(lanes)
        self._input_scale = _zeros(lanes)
        self.guidance = _zeros(branches, lanes)
        self._to_prediction = _zeros(lanes, 2)
        self._bounds = _zeros(lanes)
        self._update = _zeros(lanes, 3 + history)
        self.conditions = _zeros(branches, lanes, *condition)
        inputs = {
            "noise": self.noise,
            "timestep": self._timestep,
            "input_scale": self._input_scale,
            "guidance": self.guidance,
            "to_prediction": self._to_prediction,
            "bounds": self._bounds,
            "update": self._update,
            "encoder_hidden_states": self.conditions.reshape(branches * lanes, *condition),
        }
        self._bindings = tuple(
            session.bind(
                {
                    **inputs,
                    "sample": self._samples[source],
                    "history": self._histories[source],
                    "next_sample": self._samples[1 - source],
                    "next_history": self._histories[1 - source],
                }
            )
            for source in (0, 1)
        )
        self._source = 0
        self.write(idle_row(history), 0)

    @property
    def sample(self) -> Floats:
        """The present latents [B,C,H,W]: to be written before the first step, read after each."""
        return self._samples[self._source]

    @property
    def history(self) -> Floats:
        """The present history [S,B,C,H,W], newest first.

        To be zeroed when a lane starts: a coefficient of 0 does not silence what is not finite.
        """
        return self._histories[self._source]

    def write(self, table: Table, row: int, lanes: slice | int = slice(None)) -> None:
        """Set the coefficients of the next step for some lanes: one row of a table."""
        self._timestep[lanes] = table.timesteps[row]
        self._input_scale[lanes] = table.input_scale[row]
        self._to_prediction[lanes] = table.to_prediction[row]
        self._bounds[lanes] = table.bounds[row]
        self._update[lanes] = table.update[row]

    def step(self) -> None:
        """Take one step in all lanes. Raises BackendError; then the present sample is still the old one."""
        self._bindings[self._source].run()
        self._source = 1 - self._source


def _zeros(*shape: int) -> Floats:
    return np.zeros(shape, np.float32)
