"""Kandinsky 3: one chunk of text, which the denoiser attends to with a mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from allaprima.bundle import Bundle
from allaprima.runtime.chunks import Chunk
from allaprima.runtime.conditioning import warn_idle
from allaprima.runtime.embeddings import EmbeddingCache
from allaprima.runtime.noise import Noise
from allaprima.runtime.prior import Part
from allaprima.runtime.session import Session
from allaprima.runtime.settings import Settings
from allaprima.runtime.stages import Denoiser
from allaprima.runtime.text_encoder import TextEncoder
from allaprima.runtime.tokenizer import Tokenizer

STATES, MASK, POOLING = "encoder_hidden_states", "encoder_attention_mask", "pooling_weights"
"""The conditions of the denoiser."""
_UNKNOWN = {"clip_skip": 0, "long_prompts": False, "prompt_weights": False}
"""What was made for CLIP."""
_PRIOR = {"prior_num_inference_steps": None, "prior_guidance_scale": None}


class Kandinsky3:
    """Texts to hidden states and masks."""

    def __init__(self, bundle: Bundle, sessions: Mapping[str, Session], cache: EmbeddingCache) -> None:
        """Raises BundleError if the tokenizer cannot be read."""
        self.encoder = TextEncoder(sessions["text_encoder"], Tokenizer(bundle), cache)
        self.denoiser = sessions["denoiser"]

    def settle(self, settings: Settings) -> Settings:
        """As of Family."""
        settings.refuse(_UNKNOWN, "this model's text encoder cannot take it")
        settings.refuse(_PRIOR, "this model has no prior")
        return settings

    def plan(self, settings: Settings) -> MaskedTexts:
        """Read the prompts. Raises RequestError for text that is not valid Unicode."""
        warnings: list[str] = []
        prompt = self._read("prompt", settings.prompt, warnings)
        negative = None
        if settings.branches == 2 and settings.negative_prompt is not None:
            negative = self._read("negative prompt", settings.negative_prompt, warnings)
        return MaskedTexts(self, prompt, negative, (*warnings, *warn_idle(settings)))

    def _read(self, name: str, text: str, warnings: list[str]) -> Chunk:
        found = self.encoder.tokenizer.encode(text)
        if found.truncated:
            warnings.append(f'the {name} is too long, this was left out: "{found.truncated}"')
        return Chunk(found.ids, count=found.count)

    def unload(self) -> None:
        """Let go of all buffers."""
        self.encoder.close()


@dataclass(frozen=True)
class MaskedTexts:
    """The texts of one request, as Told; `negative` None is no text at all, not even an empty one.

    Every prompt has all the rows that the longest may have, so that one shape of the denoiser is enough: with
    the mask and the weights of the pooling (see `allaprima.export.masked`) those beyond its own do nothing.
    """

    family: Kandinsky3
    prompt: Chunk
    negative: Chunk | None = None
    warnings: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """As of Told."""
        return self.family.encoder.tokenizer.length

    def draw(self, streams: Sequence[Noise]) -> Iterator[Part]:
        """Texts are not drawn."""
        return iter(())

    def write(self, denoiser: Denoiser) -> None:
        """As of Told. Raises BackendError."""
        states, mask, pooling = (denoiser.conditions[name] for name in (STATES, MASK, POOLING))
        # As diffusers cuts all texts: after the prompt, and one row of padding if there is any.
        rows = min(self.prompt.filled + 1, self.length)
        states.array[...] = mask.array[...] = pooling.array[...] = 0
        pooling.array[..., :rows] = 1 / rows
        texts = {-1: self.prompt} if self.negative is None else {0: self.negative, -1: self.prompt}
        for branch, chunk in texts.items():
            mask.array[branch, :, : min(chunk.filled, rows)] = 1
        denoiser.push_conditions()
        made = self.family.encoder.encode(tuple(texts.values()), [0] * len(texts))
        for index, branch in enumerate(texts):
            for lane in range(denoiser.guidance.shape[1]):
                self.family.denoiser.memory.copy(states[branch, lane], made.states[index])
