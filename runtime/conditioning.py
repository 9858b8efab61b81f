"""What the prompts of a request become: chunks per guidance branch, and their states in the denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from allaprima.bundle import RequestError
from allaprima.runtime.chunks import Chunk, Chunks, make_chunks, pad_chunks
from allaprima.runtime.memory import Memory
from allaprima.runtime.request import Settings
from allaprima.runtime.session import Session
from allaprima.runtime.stages import RESCALE, Denoiser, TextEncoder
from allaprima.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Conditioning:
    """The chunks of every branch's prompt, equally many, and sentences for the user.

    `skips` are the last layers of the text encoder that each branch leaves out.
    """

    branches: tuple[tuple[Chunk, ...], ...]
    skips: tuple[int, ...]
    warnings: tuple[str, ...]

    @property
    def count(self) -> int:
        """The number of chunks of each prompt."""
        return len(self.branches[0])

    def write(self, encoder: TextEncoder, denoiser: Denoiser, memory: Memory) -> None:
        """Encode, and write the states of all chunks one after the other into every lane's condition.

        The encoder runs once per chunk, so that an engine for the prompts of one picture is enough. Raises
        BackendError.
        """
        shape = denoiser.conditions.array.shape[:2]
        conditions = denoiser.conditions.reshape(*shape, self.count, *encoder.condition)
        for index in range(self.count):
            hidden = encoder.encode([chunks[index] for chunks in self.branches], self.skips)
            for branch, lane in np.ndindex(shape):
                memory.copy(conditions[branch, lane, index], hidden[branch])


def plan_conditioning(
    tokenizer: Tokenizer, settings: Settings, layers: int | None, denoiser: Session
) -> Conditioning:
    """Read the prompts: the negative one first, where there is guidance.

    `layers` are those of the text encoder, None if its graph cannot skip. Clip skip is for the prompt alone,
    as in diffusers. Raises RequestError for text that is not valid Unicode, or more than the bundle's graphs
    can take.
    """
    _check_skip(settings.clip_skip, layers)
    _check_rescale(settings.guidance_rescale, denoiser)
    named = {"prompt": settings.prompt}
    if settings.branches == 2:
        named = {"negative prompt": settings.negative_prompt, **named}
    prompts = {
        name: make_chunks(tokenizer, prompt, long=settings.long_prompts, weighted=settings.prompt_weights)
        for name, prompt in named.items()
    }
    _check_length(prompts, denoiser)
    warnings = [
        f'the {name} is too long, this was left out: "{chunks.truncated}"'
        for name, chunks in prompts.items()
        if chunks.truncated
    ]
    if settings.branches == 1:
        idle = {
            "the negative prompt": settings.negative_prompt,
            "guidance_rescale": settings.guidance_rescale,
        }
        warnings += [
            f"{name} has no effect with guidance_scale {settings.guidance_scale}: it needs above 1"
            for name, value in idle.items()
            if value
        ]
    skips = (*(0 for _ in range(settings.branches - 1)), settings.clip_skip)
    return Conditioning(pad_chunks(tokenizer, list(prompts.values())), skips, tuple(warnings))


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
