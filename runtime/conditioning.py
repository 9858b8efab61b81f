"""What a request tells the model: chunks of text per guidance branch, sizes, and the guidance scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allaprima.bundle import RequestError
from allaprima.runtime.chunks import Chunk, Chunks, make_chunks, pad_chunks
from allaprima.runtime.memory import Memory
from allaprima.runtime.micro_conditioning import TIME_IDS
from allaprima.runtime.session import Session
from allaprima.runtime.settings import Settings
from allaprima.runtime.stages import POOLED, RESCALE, Denoiser
from allaprima.runtime.text_encoder import TextEncoder

Encoders = Mapping[str, TextEncoder]
"""The text encoders by component, in the order of the model's conditions."""

STATES = {"text_encoder": "encoder_hidden_states", "text_encoder_2": "encoder_hidden_states_2"}
"""The condition that an encoder's hidden states are."""
SCALE = "timestep_cond"


@dataclass(frozen=True)
class Conditioning:
    """The chunks of every text encoder and branch, equally many, and sentences for the user.

    `skips` are the last layers of the text encoders that each branch leaves out; `zeroed`: the first branch's
    condition is zeros.
    """

    texts: Mapping[str, tuple[tuple[Chunk, ...], ...]]
    skips: tuple[int, ...]
    zeroed: bool
    warnings: tuple[str, ...]

    @property
    def count(self) -> int:
        """The number of chunks of each prompt."""
        return len(next(iter(self.texts.values()))[0])

    def write(self, encoders: Encoders, denoiser: Denoiser, memory: Memory, settings: Settings) -> None:
        """Write all that the model is told: numbers, then the states of all chunks one after the other.

        An encoder runs once per chunk, so that an engine for the prompts of one picture is enough. The pooled
        vector is the first chunk's. Raises BackendError.
        """
        _write_numbers(denoiser, settings)
        denoiser.push_conditions()
        for role, branches in self.texts.items():
            self._encode(branches, encoders[role], denoiser, memory, STATES[role])

    def _encode(
        self,
        branches: tuple[tuple[Chunk, ...], ...],
        encoder: TextEncoder,
        denoiser: Denoiser,
        memory: Memory,
        name: str,
    ) -> None:
        shape = denoiser.guidance.shape
        states = denoiser.conditions[name].reshape(*shape, self.count, *encoder.condition)
        for index in range(self.count):
            made = encoder.encode([chunks[index] for chunks in branches], self.skips)
            for branch, lane in np.ndindex(shape):
                if self.zeroed and not branch:
                    continue  # zeros were written with the numbers
                memory.copy(states[branch, lane, index], made.states[branch])
                if made.pooled is not None and not index:
                    memory.copy(denoiser.conditions[POOLED][branch, lane], made.pooled[branch])


def _write_numbers(denoiser: Denoiser, settings: Settings) -> None:
    """Sizes and the guidance scale; zeros for all that is text."""
    conditions = denoiser.conditions
    for name in (*STATES.values(), POOLED):
        if name in conditions:
            conditions[name].array[...] = 0
    if TIME_IDS in conditions and settings.micro_conditioning is not None:
        ids = conditions[TIME_IDS].array
        negative, positive = settings.micro_conditioning.rows(ids.shape[-1], settings.height, settings.width)
        ids[:-1], ids[-1] = negative, positive
    if SCALE in conditions:
        scale = conditions[SCALE].array
        scale[...] = embed_scale(settings.guidance_scale - 1, scale.shape[-1])


def embed_scale(scale: float, width: int) -> NDArray[np.float32]:
    """Sinusoids [width] of 1000 times a guidance scale, minus 1, as consistency models were distilled with.

    Equation 6 of arXiv 2310.04378, section 4.2 says what for; the sinusoids are those of timesteps.
    """
    half = width // 2
    rates = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10000.0) / (half - 1)))
    phases = np.float32(1000 * scale) * rates
    embedded = np.zeros(width, np.float32)
    embedded[: 2 * half] = np.concatenate([np.sin(phases), np.cos(phases)])
    return embedded


def plan_conditioning(
    encoders: Encoders, settings: Settings, denoiser: Session, *, zero_negative: bool = False
) -> Conditioning:
    """Read the prompts: the negative one first, where there is guidance.

    Clip skip is for the prompt alone, as in diffusers. `zero_negative`: without a negative prompt there are
    zeros. Raises RequestError for text that is not valid Unicode, or more than the bundle's graphs can take.
    """
    for encoder in encoders.values():
        _check_skip(settings.clip_skip, encoder.layers)
    _check_rescale(settings.guidance_rescale, denoiser)
    read = {role: _read(role, encoder, settings) for role, encoder in encoders.items()}
    for prompts in read.values():
        _check_length(prompts, denoiser)
    most = max(len(chunks.chunks) for prompts in read.values() for chunks in prompts.values())
    texts = {
        role: pad_chunks(encoders[role].tokenizer, list(prompts.values()), most)
        for role, prompts in read.items()
    }
    warnings = [
        f'the {name} is too long, this was left out: "{chunks.truncated}"'
        for prompts in read.values()
        for name, chunks in prompts.items()
        if chunks.truncated
    ]
    skips = (*(0 for _ in range(settings.branches - 1)), settings.clip_skip)
    zeroed = (
        zero_negative
        and settings.branches == 2
        and settings.negative_prompt is None
        and settings.negative_prompt_2 is None
    )
    told = dict.fromkeys([*warnings, *warn_idle(settings)])
    return Conditioning(texts, skips, zeroed, tuple(told))


def _read(role: str, encoder: TextEncoder, settings: Settings) -> dict[str, Chunks]:
    """The prompts for one encoder by their names: the second one's own, or else the first one's."""
    prompt, negative = settings.prompt, settings.negative_prompt
    if role != "text_encoder":
        prompt = prompt if settings.prompt_2 is None else settings.prompt_2
        negative = negative if settings.negative_prompt_2 is None else settings.negative_prompt_2
    named = {"prompt": prompt}
    if settings.branches == 2:
        named = {"negative prompt": negative or "", **named}
    return {
        name: make_chunks(
            encoder.tokenizer, text, long=settings.long_prompts, weighted=settings.prompt_weights
        )
        for name, text in named.items()
    }


def warn_idle(settings: Settings) -> list[str]:
    """Sentences on what has no effect without guidance branches."""
    if settings.branches == 2:
        return []
    idle = {"the negative prompt": settings.negative_prompt, "guidance_rescale": settings.guidance_rescale}
    why = f"with guidance_scale {settings.guidance_scale}: it needs above 1"
    if settings.guidance_embedded:
        why = "with this model, which has its guidance built in"
    return [f"{name} has no effect {why}" for name, value in idle.items() if value]


def _check_skip(skip: int, layers: int | None) -> None:
    if skip and layers is None:
        raise RequestError(
            f"clip_skip is {skip}, but this bundle's text encoder cannot skip layers: "
            "export the checkpoint again, or leave clip_skip out"
        )
    if layers is not None and skip > layers:
        raise RequestError(f"clip_skip is {skip}: the text encoder has {layers} layers, so at most {layers}")


def _check_rescale(share: float, denoiser: Session) -> None:
    if share and RESCALE not in denoiser.inputs:
        raise RequestError(
            f"guidance_rescale is {share}, but this bundle's denoiser cannot rescale: "
            "export the checkpoint again, or leave guidance_rescale out"
        )


def _check_length(prompts: Mapping[str, Chunks], denoiser: Session) -> None:
    """RequestError if there is more than one chunk and the graph was exported for one."""
    length = denoiser.inputs["encoder_hidden_states"].shape[1]
    for name, prompt in prompts.items():
        if isinstance(length, int) and len(prompt.chunks) > 1:
            raise RequestError(
                f"the {name} needs {len(prompt.chunks)} chunks, but this bundle's denoiser takes one, of "
                f"{length} tokens: export the checkpoint again, or leave long_prompts out"
            )
