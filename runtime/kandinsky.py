"""Kandinsky 2.2: a prior turns the prompt into the embedding of a picture, which the denoiser is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from allaprima.bundle import Bundle, RequestError
from allaprima.runtime.chunks import Chunk
from allaprima.runtime.embeddings import EmbeddingCache
from allaprima.runtime.noise import Noise
from allaprima.runtime.prior import COMPONENT as PRIOR
from allaprima.runtime.prior import Prior, Text
from allaprima.runtime.result import Report
from allaprima.runtime.samplers import Table
from allaprima.runtime.session import Session
from allaprima.runtime.settings import Settings
from allaprima.runtime.stages import Denoiser, Floats
from allaprima.runtime.text_encoder import TextEncoder
from allaprima.runtime.tokenizer import Tokenizer

EMBEDS = "image_embeds"
"""The condition of the denoiser."""
_UNKNOWN = {"clip_skip": 0, "long_prompts": False, "prompt_weights": False}
"""What this family's text encoder is not for, since the prior was trained on all of one chunk."""


class Kandinsky:
    """Texts to embeddings of pictures, one for each picture and its seed."""

    def __init__(self, bundle: Bundle, sessions: Mapping[str, Session], cache: EmbeddingCache) -> None:
        """Raises BundleError if the tokenizer or the prior's settings cannot be read."""
        self.encoder = TextEncoder(sessions["text_encoder"], Tokenizer(bundle), cache)
        self.prior = Prior(bundle, sessions[PRIOR])
        self.precision = sessions["text_encoder"].precision

    def settle(self, settings: Settings) -> Settings:
        """The settings with the prior's defaults; RequestError for what the prior cannot take."""
        for name, neutral in _UNKNOWN.items():
            value = getattr(settings, name)
            if value != neutral:
                raise RequestError(f"{name} is {value}, but this model's prior cannot take it: leave it out")
        usual, steps, scale = self.prior.settings, *(_of_prior(settings))
        return replace(
            settings,
            prior_num_inference_steps=usual.num_inference_steps if steps is None else steps,
            prior_guidance_scale=usual.guidance_scale if scale is None else scale,
        )

    def plan(self, settings: Settings) -> Embedding:
        """Read the prompts; RequestError for text that is not valid Unicode, or steps out of range."""
        steps, scale = _of_prior(settings)
        assert steps is not None
        assert scale is not None
        table = self.prior.plan(steps)
        negative = settings.negative_prompt
        named = {"prompt": settings.prompt, "negative prompt": negative or ""}
        tokens = {name: self.encoder.tokenizer.encode(text) for name, text in named.items()}
        warnings = [
            f'the {name} is too long, this was left out: "{found.truncated}"'
            for name, found in tokens.items()
            if found.truncated
        ]
        if negative and scale <= 1 and settings.branches == 1:
            warnings.append(
                f"the negative prompt has no effect with guidance_scale {settings.guidance_scale} and "
                f"prior_guidance_scale {scale}: one of them should be above 1"
            )
        if settings.guidance_rescale and settings.branches == 1:
            warnings.append(
                f"guidance_rescale has no effect with guidance_scale {settings.guidance_scale}: it needs "
                "above 1"
            )
        chunks = tuple(Chunk(found.ids) for found in tokens.values())
        counts = tuple(self.encoder.tokenizer.count(text) for text in named.values())
        return Embedding(
            self, table, scale, chunks, counts, doubled=negative is not None, warnings=tuple(warnings)
        )

    def unload(self) -> None:
        """Let go of all buffers."""
        self.encoder.close()
        self.prior.unload()

    def read(self, chunks: Sequence[Chunk], counts: Sequence[int]) -> list[Text]:
        """Texts as the prior takes them, of chunks with this many tokens before the padding."""
        made = self.encoder.encode(chunks, [0] * len(chunks))
        made.pull()
        masks = [(np.arange(len(chunk.ids)) < count) for chunk, count in zip(chunks, counts, strict=True)]
        assert made.pooled is not None
        return [
            Text(states.copy(), pooled.copy(), mask.astype(np.float32))
            for states, pooled, mask in zip(made.states.array, made.pooled.array, masks, strict=True)
        ]


def _of_prior(settings: Settings) -> tuple[int | None, float | None]:
    return settings.prior_num_inference_steps, settings.prior_guidance_scale


@dataclass
class Embedding:
    """The embeddings of one request: of the prompt, and of what the denoiser is guided away from.

    `chunks` and `counts` are those of the prompt and of the negative one. `doubled`: a negative prompt was
    given, so its embedding is drawn too; without one it is that of no picture.
    """

    family: Kandinsky
    table: Table
    guidance_scale: float
    chunks: tuple[Chunk, ...]
    counts: tuple[int, ...]
    doubled: bool
    warnings: tuple[str, ...]
    length: int = 1
    embeds: Floats = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))
    """[2,N,D], negative and positive, once drawn."""

    def draw(self, streams: Sequence[Noise], report: Report | None = None) -> None:
        """Run the prior. Both texts are guided against the negative one, as in diffusers."""
        positive, negative = self.family.read(self.chunks, self.counts)
        against = negative if self.guidance_scale > 1 else None
        texts = [positive, negative] if self.doubled else [positive]
        made = self.family.prior.embed(texts, against, self.table, self.guidance_scale, streams, report)
        other = made[1] if self.doubled else np.array(self.family.prior.settings.zero, np.float32)
        self.embeds = np.stack([np.broadcast_to(other, made[0].shape), made[0]])

    def write(self, denoiser: Denoiser) -> None:
        """The negative embedding for the first of two branches, the prompt's for the last."""
        array = denoiser.conditions[EMBEDS].array
        array[...] = self.embeds[-len(array) :]
        denoiser.push_conditions()
