"""Kandinsky 2.2: a prior turns the prompt into the embedding of a picture, which the denoiser is told."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from allaprima.bundle import Bundle, RequestError
from allaprima.runtime import hint
from allaprima.runtime.chunks import Chunk
from allaprima.runtime.embeddings import EmbeddingCache
from allaprima.runtime.hint import HintEncoder
from allaprima.runtime.noise import Noise
from allaprima.runtime.prior import COMPONENT as PRIOR
from allaprima.runtime.prior import Part, Prior, Text
from allaprima.runtime.prior_request import PriorRequest
from allaprima.runtime.samplers import Table
from allaprima.runtime.session import Session
from allaprima.runtime.settings import Settings
from allaprima.runtime.stages import Denoiser, Floats
from allaprima.runtime.text_encoder import TextEncoder
from allaprima.runtime.tokenizer import Tokenizer
from allaprima.runtime.vision import COMPONENT as IMAGE_ENCODER
from allaprima.runtime.vision import VisionEncoder

EMBEDS = "image_embeds"
"""The condition of the denoiser."""
_UNKNOWN = {"clip_skip": 0, "long_prompts": False, "prompt_weights": False}
"""What this family's text encoder is not for, since the prior was trained on all of one chunk."""


class Kandinsky:
    """Texts to embeddings of pictures, one for each picture and its seed."""

    def __init__(
        self,
        bundle: Bundle,
        sessions: Mapping[str, Session],
        opens: Callable[[str], Session],
        cache: EmbeddingCache,
    ) -> None:
        """`opens` gives the session of a component that only some requests need: the image encoder.

        Raises BundleError if the tokenizer or the prior's settings cannot be read.
        """
        self.encoder = TextEncoder(sessions["text_encoder"], Tokenizer(bundle), cache)
        self.prior = Prior(bundle, sessions[PRIOR])
        self.precision = sessions["text_encoder"].precision
        self._bundle, self._opens = bundle, opens
        self._hints = sessions.get(hint.COMPONENT)
        self._vision: VisionEncoder | None = None
        self._hint: tuple[tuple[int, int], HintEncoder] | None = None

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
        asked = settings.prior
        table = self.prior.plan(steps, asked.strength)
        tokens = {name: self.encoder.tokenizer.encode(text) for name, text in _named(settings).items()}
        warnings = [
            f'the {name} is too long, this was left out: "{found.truncated}"'
            for name, found in tokens.items()
            if found.truncated
        ]
        warnings += _without_effect(settings, scale)
        return Embedding(self, settings, table, scale, warnings=tuple(warnings))

    def unload(self) -> None:
        """Let go of all buffers."""
        self.encoder.close()
        self.prior.unload()
        self._vision = self._hint = None

    def read(self, texts: Sequence[str]) -> list[Text]:
        """Texts as the prior takes them."""
        chunks = [Chunk(self.encoder.tokenizer.encode(text).ids) for text in texts]
        made = self.encoder.encode(chunks, [0] * len(chunks))
        made.pull()
        counts = map(self.encoder.tokenizer.count, texts)
        masks = [(np.arange(len(chunk.ids)) < count) for chunk, count in zip(chunks, counts, strict=True)]
        assert made.pooled is not None
        return [
            Text(states.copy(), pooled.copy(), mask.astype(np.float32))
            for states, pooled, mask in zip(made.states.array, made.pooled.array, masks, strict=True)
        ]

    def embed(self, picture: Image.Image) -> Floats:
        """The embedding [D] that CLIP has of a picture; the graph is loaded when it is first needed."""
        if self._vision is None:
            self._vision = VisionEncoder(self._bundle, self._opens(IMAGE_ENCODER))
        return self._vision.embed(picture)

    def read_hint(self, picture: Image.Image, height: int, width: int) -> Floats:
        """What the denoiser takes of a hint, [C,H,W]."""
        assert self._hints is not None
        key = height, width
        if self._hint is None or self._hint[0] != key:
            self._hint = None
            self._hint = key, HintEncoder(self._hints, *key)
        return self._hint[1].encode(picture)


def _of_prior(settings: Settings) -> tuple[int | None, float | None]:
    return settings.prior_num_inference_steps, settings.prior_guidance_scale


def _named(settings: Settings) -> dict[str, str]:
    """The texts of a request, by what warnings call them."""
    mixed = (item for item, _ in settings.prior.mix)
    named = {
        f"text {number} of the mix": item
        for number, item in enumerate(mixed, start=1)
        if isinstance(item, str)
    }
    named = named or {"prompt": settings.prompt}
    return {
        **named,
        "negative prompt": settings.negative_prompt or "",
        "prior_negative_prompt": settings.prior.negative_prompt or "",
    }


def _without_effect(settings: Settings, scale: float) -> list[str]:
    """Warnings of what guidance does not act on."""
    warnings = []
    painted = f"guidance_scale {settings.guidance_scale}"
    needs = "it needs above 1"
    if settings.branches == 2:
        return []
    if settings.prior.mix:
        if settings.negative_prompt:
            warnings.append(f"the negative prompt has no effect with {painted}: {needs}")
        if settings.prior.negative_prompt and scale <= 1:
            warnings.append(f"prior_negative_prompt has no effect with prior_guidance_scale {scale}: {needs}")
    elif settings.negative_prompt and scale <= 1:
        warnings.append(
            f"the negative prompt has no effect with {painted} and prior_guidance_scale {scale}: one of them "
            "should be above 1"
        )
    if settings.guidance_rescale:
        warnings.append(f"guidance_rescale has no effect with {painted}: {needs}")
    return warnings


@dataclass
class Embedding:
    """The embeddings of one request: of what is asked for, and of what the denoiser is guided away from."""

    family: Kandinsky
    settings: Settings
    table: Table
    guidance_scale: float
    warnings: tuple[str, ...]
    length: int = 1
    embeds: Floats = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))
    """[2,N,D], negative and positive, once drawn."""

    def draw(self, streams: Sequence[Noise]) -> Iterator[Part]:
        """Run the prior, for each text of a mix."""
        asked, settings = self.settings.prior, self.settings
        if asked.mix:
            positive, negative = yield from self._mix(asked, streams)
        else:
            start = None if asked.picture is None else self.family.embed(asked.picture)
            positive, negative = yield from self._run(
                settings.prompt, settings.negative_prompt, streams, start
            )
        self.embeds = np.stack([np.broadcast_to(negative, positive.shape), positive])

    def _run(
        self, text: str, negative: str | None, streams: Sequence[Noise], start: Floats | None = None
    ) -> Generator[Part, None, tuple[Floats, Floats]]:
        """The embedding [N,D] of a text, and the one that goes with its negative.

        That of a negative text, even an empty one, is drawn too; without one it is that of no picture, [D].
        Both texts are guided against the negative one, as in diffusers.
        """
        prior, scale = self.family.prior, self.guidance_scale
        texts = self.family.read((text, negative or ""))
        against = texts[1] if scale > 1 else None
        asked = texts[: 1 if negative is None else 2]
        made = yield from prior.embed(asked, against, self.table, scale, streams, start)
        return made[0], self._zero if negative is None else made[1]

    def _mix(
        self, asked: PriorRequest, streams: Sequence[Noise]
    ) -> Generator[Part, None, tuple[Floats, Floats]]:
        """The weighted sum of a mix [N,D], and the negative embedding; the order of draws is diffusers'."""
        against = asked.negative_prompt
        mixed: Floats = np.zeros((len(streams), len(self._zero)), np.float32)
        for item, weight in asked.mix:
            if isinstance(item, str):
                made, _ = yield from self._run(item, against, streams)
            else:
                made = self.family.embed(item)
            mixed += np.float32(weight) * made
        # The prior runs once more for the negative. Where that counts for nothing, only its noise is drawn.
        negative = self.settings.negative_prompt or ""
        if self.settings.branches == 1 or (not negative and against is None):
            self.family.prior.skip(1 if against is None else 2, self.table, streams)
            return mixed, self._zero
        made, other = yield from self._run(negative, against, streams)
        return mixed, made if negative else other

    @property
    def _zero(self) -> Floats:
        return np.array(self.family.prior.settings.zero, np.float32)

    def write(self, denoiser: Denoiser) -> None:
        """The negative embedding for the first of two branches, the prompt's for the last; and the hint."""
        array = denoiser.conditions[EMBEDS].array
        array[...] = self.embeds[-len(array) :]
        if self.settings.hint is not None:
            hinted = denoiser.conditions[hint.EMBEDS].array
            hinted[...] = self.family.read_hint(self.settings.hint, *hinted.shape[-2:])
        denoiser.push_conditions()
