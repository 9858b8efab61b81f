"""What comes before the first step of a picture and after the last, whatever batch it takes them in."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import fields

from PIL import Image

from allaprima.bundle import VERSION, Bundle
from allaprima.runtime.conventions import conventions_of
from allaprima.runtime.families import Told
from allaprima.runtime.inpainting import Kept
from allaprima.runtime.latents import Beginning
from allaprima.runtime.loop import Callback, guide, tell
from allaprima.runtime.noise import Noise
from allaprima.runtime.prior import Part
from allaprima.runtime.result import Parameters
from allaprima.runtime.safety import blurred
from allaprima.runtime.samplers import Table
from allaprima.runtime.settings import Settings
from allaprima.runtime.stages import Denoiser, Floats
from allaprima.runtime.staging import Staging


class Painter:
    """Begins and ends pictures of a bundle, with the stages of a pipeline."""

    def __init__(self, bundle: Bundle, stages: Staging, *, backend: str, precision: str) -> None:
        self._bundle, self._stages = bundle, stages
        self._backend, self._precision = backend, precision

    def begin(
        self,
        settings: Settings,
        table: Table,
        told: Told,
        denoiser: Denoiser,
    ) -> Generator[Part, None, tuple[list[Noise], Kept | None]]:
        """Write into a denoiser all that comes before its first step, a part at a time.

        Returns the streams of noise, and what a mask keeps. Raises RequestError or BackendError.
        """
        manifest = self._bundle.manifest
        conventions = conventions_of(manifest)
        beginning = Beginning(
            settings, table, manifest.latent, lambda: self._stages.encoder(settings), conventions
        )
        yield from told.draw(beginning.streams)
        kept = beginning.write(denoiser)
        guide(denoiser, settings, conventions.guidance_offset)
        told.write(denoiser)
        return beginning.streams, kept

    def end(
        self, denoiser: Denoiser, settings: Settings, callback: Callback | None
    ) -> tuple[Floats | None, tuple[Image.Image, ...], tuple[bool, ...] | None]:
        """After the last step: latents or pictures, as the request wants, and which pictures were flagged.

        Raises BackendError.
        """
        if settings.output_type == "latent":
            return denoiser.sample.copy(), (), None
        return None, *self._check_safety(self._decode(denoiser, settings, callback))

    def _decode(
        self, denoiser: Denoiser, settings: Settings, callback: Callback | None
    ) -> tuple[Image.Image, ...]:
        decoder = self._stages.decoder(settings)
        images = []
        for lane in range(settings.num_images):
            images.append(Image.fromarray(decoder.decode(denoiser.lane(lane)).copy()))
            tell(callback, "decode", len(images), settings.num_images, denoiser)
        return tuple(images)

    def _check_safety(
        self, images: tuple[Image.Image, ...]
    ) -> tuple[tuple[Image.Image, ...], tuple[bool, ...] | None]:
        """The pictures, flagged ones blurred, and which those are; None where nobody looks."""
        checker = self._stages.safety() if images else None
        if checker is None:
            return images, None
        flagged = tuple(checker.flags(image) for image in images)
        shown = (blurred(image) if bad else image for image, bad in zip(images, flagged, strict=True))
        return tuple(shown), flagged

    def describe(self, settings: Settings, table: Table, index: int) -> Parameters:
        """How picture `index` is made."""
        known = {field.name for field in fields(Parameters)}
        given = {name: value for name, value in vars(settings).items() if name in known}
        chosen = {"sampler": table.sampler, "sampling": settings.sampling.to_json()}
        return Parameters(
            **{**given, **_seeds(settings, index), **chosen, **settings.prior.describe()},
            bundle=self._bundle.manifest.name,
            backend=self._backend,
            precision=self._precision,
            version=VERSION,
        )


def _seeds(settings: Settings, index: int) -> dict[str, int | None]:
    """What image `index` alone is painted with."""
    if settings.variation_seed is None:
        return {"seed": settings.seed + index, "variation_seed": None}
    return {"seed": settings.seed, "variation_seed": settings.variation_seed + index}
