"""The stages of a pipeline, kept from one request to the next of the same shape, for their buffers."""

from __future__ import annotations

from allaprima.bundle import BackendError, Bundle
from allaprima.runtime.components import Components
from allaprima.runtime.memory import HostMemory
from allaprima.runtime.painting import Shape
from allaprima.runtime.safety import COMPONENT as SAFETY
from allaprima.runtime.safety import SafetyChecker
from allaprima.runtime.settings import Settings
from allaprima.runtime.stages import Decoder, Denoiser, Encoder
from allaprima.runtime.step_cache import DEEP, SHALLOW

DENOISER, DECODER, ENCODER = "denoiser", "vae_decoder", "vae_encoder"
KEPT = 4
"""Denoisers of a device, the least recently used of which goes first."""


class Staging:
    """Makes the stages over a pipeline's components, each when it is first asked for."""

    def __init__(self, bundle: Bundle, components: Components) -> None:
        self._bundle, self._components = bundle, components
        self._denoisers: dict[object, Denoiser] = {}  # by what they were made for, the last used last
        self.drop()

    def drop(self) -> None:
        """Let go of all of them."""
        self._keep(0)
        self._decoder: tuple[object, Decoder] | None = None
        self._encoder: tuple[object, Encoder] | None = None
        self._safety: SafetyChecker | None = None

    def denoiser(self, settings: Settings, length: int) -> Denoiser:
        """The denoiser of the request's shape, for `length` tokens.

        On a device those of the last few shapes are kept, since each has CUDA graphs that take time and
        memory to capture. The graphs of a cached step are opened when they are first needed. Raises
        BackendError or RequestError.
        """
        cached = settings.cache_interval > 1
        shape = Shape(settings.height, settings.width, settings.branches, length)
        key = (shape, settings.num_images, cached)
        if key not in self._denoisers:
            on_host = isinstance(self._components.sessions[DENOISER].memory, HostMemory)
            # First, so that old and new buffers do not exist together where one denoiser is kept.
            self._keep(0 if on_host or self._components.limited else KEPT - 1)
            try:
                made = self.make_denoiser(shape, settings.num_images, cached=cached)
            except BackendError:
                if not self._denoisers:
                    raise
                self._keep(0)  # what the others hold may be the memory that it lacks
                made = self.make_denoiser(shape, settings.num_images, cached=cached)
            self._denoisers[key] = made
        self._denoisers[key] = self._denoisers.pop(key)
        return self._denoisers[key]

    def _keep(self, count: int) -> None:
        """Let go of all denoisers but those that were used last."""
        while len(self._denoisers) > count:
            self._denoisers.pop(next(iter(self._denoisers))).retire()

    def make_denoiser(
        self, shape: Shape, lanes: int, *, cached: bool = False, bound: bool = True
    ) -> Denoiser:
        """A denoiser that is not kept; see Denoiser for `bound`. Raises BackendError or RequestError."""
        latent = self._bundle.manifest.latent
        height, width = shape.height // latent.downscale, shape.width // latent.downscale
        return Denoiser(
            self._components.open(DEEP if cached else DENOISER),
            (lanes, latent.channels, height, width),
            branches=shape.branches,
            history=self._bundle.manifest.history,
            length=shape.length,
            shallow=self._components.open(SHALLOW) if cached else None,
            bound=bound,
        )

    def encoder(self, settings: Settings) -> Encoder:
        """The image encoder of the request's size; the graph is opened when it is first needed.

        Raises BackendError or RequestError.
        """
        session = self._components.open(ENCODER)
        key = settings.height, settings.width
        if self._encoder is None or self._encoder[0] != key:
            self._encoder = None
            self._encoder = key, Encoder(session, self._bundle.manifest.latent, *key)
        return self._encoder[1]

    def decoder(self, settings: Settings) -> Decoder:
        """The decoder of the request's size. Raises BackendError or RequestError."""
        key = settings.height, settings.width
        if self._decoder is None or self._decoder[0] != key:
            self._decoder = None
            session = self._components.sessions[DECODER]
            self._decoder = key, Decoder(session, self._bundle.manifest.latent, *key)
        return self._decoder[1]

    def safety(self) -> SafetyChecker | None:
        """The safety checker; None if there is none, or it is switched off. Raises BackendError."""
        session = self._components.sessions.get(SAFETY)
        if session is not None and self._safety is None:
            self._safety = SafetyChecker(self._bundle, session)
        return self._safety
