"""A prior: from a text to the embedding of a picture that it could belong to, in a sampling loop."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from allaprima.bundle import Bundle, BundleError, Record, RequestError
from allaprima.runtime.noise import Noise
from allaprima.runtime.result import Stage
from allaprima.runtime.samplers import Table, make_table
from allaprima.runtime.session import Session
from allaprima.runtime.stages import POOLED, Denoiser, Floats, not_finite

COMPONENT = "prior"
FILE = f"{COMPONENT}/settings.json"
STATES, MASK = "encoder_hidden_states", "attention_mask"


@dataclass(frozen=True)
class PriorSettings(Record):
    """What a prior needs beside its graph.

    `scheduler` is diffusers' scheduler_config.json, the numbers are its defaults. A sample times `std` plus
    `mean` is an embedding, [D] each; `zero` [D] is the embedding of no picture.
    """

    scheduler: Mapping[str, Any]
    num_inference_steps: int
    guidance_scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    zero: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == len(self.zero) > 0:
            raise ValueError("mean, std and zero are not of one length")


def read_prior_settings(bundle: Bundle) -> PriorSettings:
    """The settings in a bundle. Raises BundleError."""
    try:
        return PriorSettings.from_json(json.loads(bundle.path(FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as cause:
        raise BundleError(f"the settings of the prior cannot be read: {cause}") from cause


@dataclass(frozen=True)
class Text:
    """A text as the prior takes it: hidden states [L,W], their projection [D], what is of tokens [L]."""

    states: Floats
    pooled: Floats
    mask: Floats


class Part(NamedTuple):
    """So many steps of a stage were taken, of all that there are; `denoiser` has the sample."""

    stage: Stage
    step: int
    total: int
    denoiser: Denoiser


class Prior:
    """A session of the component prior with its settings."""

    def __init__(self, bundle: Bundle, session: Session) -> None:
        """Raises BundleError if the bundle's settings cannot be read."""
        self.settings = read_prior_settings(bundle)
        self._session = session
        self._history = bundle.manifest.history
        self._length = bundle.manifest.length
        self._denoiser: tuple[object, Denoiser] | None = None

    def plan(self, steps: int, strength: float | None = None) -> Table:
        """The table of this many steps, or of the last share of them, as diffusers counts it.

        Raises RequestError if there cannot be so many, or none is left.
        """
        begin = 0 if strength is None else steps - int(steps * strength)
        if begin == steps:
            raise RequestError(
                f"prior_strength {strength} of {steps} steps is no step at all: raise it to {1 / steps:.3g} "
                "or more, or prior_num_inference_steps"
            )
        return make_table(self.settings.scheduler, None, steps, history=self._history, begin=begin)

    def embed(
        self,
        texts: Sequence[Text],
        against: Text | None,
        table: Table,
        guidance_scale: float,
        streams: Sequence[Noise],
        start: Floats | None = None,
    ) -> Generator[Part, None, Floats]:
        """Embeddings [T,N,D] of T texts for N pictures, drawn from the stream of each, a step at a time.

        Each is guided away from the text `against`; None is no guidance. One draw of a stream is for all
        texts of its picture, as diffusers has it. `start` [D] is the embedding that a table begins with which
        is not the whole. Until it has ended, no other may be begun. Raises BackendError.
        """
        branches = [texts[0] if against is None else against] * (against is not None)
        count, pictures, width = len(texts), len(streams), len(self.settings.mean)
        denoiser = self._prepare(count * pictures, 1 + len(branches))
        denoiser.guidance[...] = [[1 - guidance_scale], [guidance_scale]] if branches else 1
        if denoiser.guidance_rescale is not None:
            denoiser.guidance_rescale[...] = 0
        for name, part in ((STATES, "states"), (POOLED, "pooled"), (MASK, "mask")):
            array = denoiser.conditions[name].array
            for branch in range(len(array)):
                for index, text in enumerate(texts):
                    told = text if branch == len(array) - 1 else branches[0]
                    array[branch, index * pictures : (index + 1) * pictures] = getattr(told, part)
        denoiser.push_conditions()
        _draw(denoiser.sample, count, streams)
        if start is not None:
            assert table.levels is not None  # or it could not begin later
            clean, noise = table.levels[0].astype(np.float32)
            denoiser.sample[...] = clean * start[:, None, None] + noise * denoiser.sample
        denoiser.history[...] = 0
        denoiser.push()
        for row in range(len(table.timesteps)):
            denoiser.write(table, row)
            if table.draws[row]:
                _draw(denoiser.noise, count, streams)
                denoiser.push_noise()
            denoiser.step()
            yield Part("prior", row + 1, len(table.timesteps), denoiser)
        denoiser.pull()
        if not np.isfinite(denoiser.sample).all():
            raise not_finite(COMPONENT, self._session.precision)
        std, mean = (np.array(each, np.float32) for each in (self.settings.std, self.settings.mean))
        made: Floats = denoiser.sample.reshape(count, pictures, width) * std + mean
        return made

    def skip(self, texts: int, table: Table, streams: Sequence[Noise]) -> None:
        """Draw what `embed` would of the streams for so many texts, and make nothing of it."""
        unused = np.empty((texts * len(streams), len(self.settings.mean)), np.float32)
        for _ in range(1 + int(np.count_nonzero(table.draws))):
            _draw(unused, texts, streams)

    def unload(self) -> None:
        """Let go of all buffers."""
        if self._denoiser is not None:
            self._denoiser[1].retire()
            self._denoiser = None

    def _prepare(self, lanes: int, branches: int) -> Denoiser:
        """The step of this many lanes: the last one if it fits, for its buffers."""
        key = lanes, branches
        if self._denoiser is None or self._denoiser[0] != key:
            self.unload()
            shape = lanes, len(self.settings.mean), 1, 1
            denoiser = Denoiser(
                self._session, shape, branches=branches, history=self._history, length=self._length
            )
            self._denoiser = key, denoiser
        return self._denoiser[1]


def _draw(noise: Floats, texts: int, streams: Sequence[Noise]) -> None:
    """Fill noise [T*N,D,1,1]: one draw for all texts of a picture."""
    parts = noise.reshape(texts, len(streams), -1)
    for index, stream in enumerate(streams):
        parts[:, index] = stream.normal((texts, parts.shape[-1]))
