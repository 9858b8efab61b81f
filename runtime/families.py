"""What differs between families of models: which graphs they need, and how a prompt becomes conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from allaprima.bundle import Bundle, BundleError, Manifest
from allaprima.runtime.conditioning import Conditioning, plan_conditioning
from allaprima.runtime.embeddings import EmbeddingCache
from allaprima.runtime.hint import COMPONENT as HINTS
from allaprima.runtime.kandinsky import Kandinsky
from allaprima.runtime.kandinsky3 import Kandinsky3
from allaprima.runtime.noise import Noise
from allaprima.runtime.prior import COMPONENT as PRIOR
from allaprima.runtime.prior import Part
from allaprima.runtime.session import Session
from allaprima.runtime.settings import Settings
from allaprima.runtime.stages import Denoiser
from allaprima.runtime.text_encoder import TextEncoder
from allaprima.runtime.tokenizer import Tokenizer

COMPONENTS = ("denoiser", "vae_decoder")
"""What every picture needs, beside the text encoders."""


class Told(Protocol):
    """What one request tells the denoiser."""

    @property
    def length(self) -> int:
        """L, the tokens of one prompt that the denoiser is told."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences for the user."""

    def draw(self, streams: Sequence[Noise]) -> Iterator[Part]:
        """Draw what comes before the first latents, from the stream of each picture, a step at a time.

        Raises BackendError.
        """

    def write(self, denoiser: Denoiser) -> None:
        """Write all conditions, after `draw`, and push them with those that were written before."""


class Family(Protocol):
    """How the models of a family are told what to paint."""

    def settle(self, settings: Settings) -> Settings:
        """The settings with the family's own defaults; RequestError for what it cannot do."""

    def plan(self, settings: Settings) -> Told:
        """Read the prompts. Raises RequestError."""

    def unload(self) -> None:
        """Let go of all buffers; they come back when needed."""


class StableDiffusion:
    """Texts to hidden states, which the denoiser attends to."""

    def __init__(self, bundle: Bundle, sessions: Mapping[str, Session], cache: EmbeddingCache) -> None:
        """Raises BundleError if a tokenizer cannot be read."""
        self._manifest = bundle.manifest
        self._denoiser = sessions["denoiser"]
        self._encoders = {
            role: TextEncoder(sessions[role], Tokenizer(bundle, role), cache)
            for role in bundle.manifest.tokenizers
        }

    def settle(self, settings: Settings) -> Settings:
        """As of Family."""
        settings.refuse(
            {"prior_num_inference_steps": None, "prior_guidance_scale": None}, "this model has no prior"
        )
        return settings

    def plan(self, settings: Settings) -> Told:
        """As of Family."""
        conditioning = plan_conditioning(
            self._encoders, settings, self._denoiser, zero_negative=self._manifest.zero_negative
        )
        return _Texts(self._encoders, conditioning, settings, self._denoiser, self._manifest.length)

    def unload(self) -> None:
        """As of Family."""
        for encoder in self._encoders.values():
            encoder.close()


@dataclass(frozen=True)
class _Texts:
    """As of Told."""

    encoders: Mapping[str, TextEncoder]
    conditioning: Conditioning
    settings: Settings
    session: Session
    tokens: int

    @property
    def length(self) -> int:
        return self.conditioning.count * self.tokens

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.conditioning.warnings

    def draw(self, streams: Sequence[Noise]) -> Iterator[Part]:
        """Texts are not drawn."""
        return iter(())

    def write(self, denoiser: Denoiser) -> None:
        self.conditioning.write(self.encoders, denoiser, self.session.memory, self.settings)


Opens = Callable[[str], Session]
"""The session of a component that only some requests need."""
_Open = Callable[[Bundle, Mapping[str, Session], Opens, EmbeddingCache], Family]
_FAMILIES: Mapping[str, tuple[_Open, tuple[str, ...]]] = {
    "stable-diffusion": (
        lambda bundle, sessions, _, cache: StableDiffusion(bundle, sessions, cache),
        COMPONENTS,
    ),
    "kandinsky-2.2": (Kandinsky, (PRIOR, *COMPONENTS)),
    "kandinsky-3": (lambda bundle, sessions, _, cache: Kandinsky3(bundle, sessions, cache), COMPONENTS),
}


def needed(manifest: Manifest) -> tuple[str, ...]:
    """The components that every picture needs; those of a family that is not known are the usual ones."""
    _, components = _FAMILIES.get(manifest.family, (None, COMPONENTS))
    hints = (HINTS,) if HINTS in manifest.components else ()
    return (*manifest.tokenizers, *components, *hints)


def open_family(
    bundle: Bundle, sessions: Mapping[str, Session], opens: Opens, cache: EmbeddingCache
) -> Family:
    """The family of a bundle, over opened sessions.

    `opens` opens others when a request first needs them; `cache` is for the text encoders.

    Raises BundleError if there is none of that name.
    """
    name = bundle.manifest.family
    if name not in _FAMILIES:
        raise BundleError(
            f"{bundle.folder} is of the family '{name}', but this version paints only "
            f"{' and '.join(_FAMILIES)}: upgrade allaprima"
        )
    kind, _ = _FAMILIES[name]
    return kind(bundle, sessions, opens, cache)
