"""The latents that painting begins with: noise, a picture's own, and what a mask keeps of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from allaprima.bundle import Latent, RequestError
from allaprima.runtime.conventions import USUAL, Conventions
from allaprima.runtime.inpainting import Kept, grown, latent_mask, without
from allaprima.runtime.noise import Noise, turned
from allaprima.runtime.pictures import encodable
from allaprima.runtime.samplers import Table
from allaprima.runtime.settings import Settings
from allaprima.runtime.stages import Denoiser, Encoder, Floats

MASK, MASKED = "mask", "masked_image_latents"


class Beginning:
    """Latents and streams of noise for the pictures of one request.

    A picture's own latents are drawn first, then the noise over them, then the latents of what a mask leaves
    of it, as in diffusers; the streams go on from there.
    """

    def __init__(
        self,
        settings: Settings,
        table: Table,
        latent: Latent,
        encoder: Callable[[], Encoder],
        conventions: Conventions = USUAL,
    ) -> None:
        """`encoder` gives the image encoder of the request's size, if a picture needs it."""
        self._settings, self._table, self._latent, self._encoder = settings, table, latent, encoder
        self._conventions = conventions
        varied = settings.variation_seed is not None
        self.streams = [Noise(settings.seed + index * (not varied)) for index in range(settings.num_images)]

    def write(self, denoiser: Denoiser) -> Kept | None:
        """Write the latents, and the conditions that a mask makes; what is kept and put back is returned.

        Raises RequestError if the sampler cannot begin so, or the bundle cannot encode pictures.
        """
        settings, table = self._settings, self._table
        widened = MASK in denoiser.conditions
        clean, scale = 0.0, table.init_noise_sigma
        latents = np.zeros(denoiser.sample.shape, np.float32)
        if settings.denoising_start is not None:
            clean, scale, latents[...] = 1.0, 0.0, settings.latents
        elif settings.strength is not None:
            if table.levels is None:
                raise RequestError(f"sampler {table.sampler!r} cannot begin with a picture: choose another")
            if settings.mask is None or settings.begin:
                clean, scale = map(float, table.levels[0])
            if clean or not widened or self._conventions.masks_latents:
                latents[...] = self._encoded(settings.picture)
        noise = self._noise(denoiser.sample.shape)
        denoiser.sample[...] = np.float32(clean) * latents + np.float32(scale) * noise
        denoiser.history[...] = 0
        denoiser.push()
        if settings.mask is None:
            return None
        mask = latent_mask(settings.mask, settings.height, settings.width, self._latent.downscale)
        if self._conventions.masks_latents:
            mask = grown(mask)
            if widened:
                denoiser.conditions[MASK].array[...] = 1 - mask
                denoiser.conditions[MASKED].array[...] = latents * (1 - mask)
            return Kept(mask, latents, noise)
        if widened:
            denoiser.conditions[MASK].array[...] = mask
            denoiser.conditions[MASKED].array[...] = self._encoded(settings.picture, settings.mask)
            return None
        for stream in self.streams:
            stream.normal(noise.shape[1:])  # diffusers draws them even where the model does not see them
        return Kept(mask, latents, noise)

    def _noise(self, shape: tuple[int, ...]) -> Floats:
        """The first noise [B,C,H,W]."""
        noise = np.empty(shape, np.float32)
        for index, (first, stream) in enumerate(zip(noise, self.streams, strict=True)):
            first[...] = stream.normal(first.shape)
            if self._settings.variation_seed is not None:
                other = Noise(self._settings.variation_seed + index).normal(first.shape)
                first[...] = turned(first, other, self._settings.variation_strength)
        return noise

    def _encoded(self, picture: Image.Image | None, mask: Image.Image | None = None) -> Floats:
        """The latents [B,C,H,W] of a picture, drawn for each stream; those handed in if there is none."""
        settings = self._settings
        if picture is None:
            assert settings.latents is not None
            return settings.latents
        image = encodable(picture, settings.height, settings.width, self._conventions)
        if mask is not None:
            image = without(image, mask)
        mean, deviation = self._encoder().encode(image)
        if deviation is None:
            return np.stack([mean] * len(self.streams))
        return np.stack([mean + deviation * stream.normal(mean.shape) for stream in self.streams])
