"""Text to pictures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from allaprima.bundle import (
    VERSION,
    BackendError,
    Bundle,
    BundleError,
    RequestError,
    open_bundle,
    resolve,
)
from allaprima.runtime.backends import choose, find_engines, open_session
from allaprima.runtime.conditioning import Conditioning, plan_conditioning
from allaprima.runtime.inpainting import Kept, latent_mask
from allaprima.runtime.noise import Draws, Noise, turned
from allaprima.runtime.pictures import Source, encodable
from allaprima.runtime.request import Request, Settings
from allaprima.runtime.result import Parameters, Progress, Result, Stage
from allaprima.runtime.safety import COMPONENT as SAFETY
from allaprima.runtime.safety import SafetyChecker, blurred
from allaprima.runtime.samplers import Table, make_table
from allaprima.runtime.sampling import Sampling
from allaprima.runtime.session import Session
from allaprima.runtime.stages import Decoder, Denoiser, Encoder, Floats, TextEncoder, check_table
from allaprima.runtime.tokenizer import Tokenizer

Callback = Callable[[Progress], None]

FAMILY = "stable-diffusion"
COMPONENTS = ("text_encoder", "denoiser", "vae_decoder")
ENCODER = "vae_encoder"


class Pipeline:
    """A bundle, opened with one backend, painting one request at a time.

    Buffers are kept for the next request of the same shape. A second request while one is being painted
    (from another thread, or from a callback) is RequestError; open one pipeline per thread.
    """

    def __init__(
        self,
        bundle: Bundle,
        sessions: Mapping[str, Session],
        *,
        backend: str,
        opens: Callable[[str], Session] | None = None,
    ) -> None:
        """Take over opened sessions of text_encoder, denoiser and vae_decoder; `open` does it all.

        `opens` opens another component when a request first needs it: the vae_encoder, for pictures that are
        handed in.

        Raises BundleError if the bundle is of another family or its tokenizer cannot be read.
        """
        if bundle.manifest.family != FAMILY:
            raise BundleError(
                f"{bundle.folder} is of the family '{bundle.manifest.family}', but this version paints only "
                f"{FAMILY}: upgrade allaprima"
            )
        self.bundle = bundle
        self.backend = backend
        self.precision = sessions["denoiser"].precision
        self._sessions = dict(sessions)
        self._opens = opens
        self._tokenizer = Tokenizer(bundle)
        self._text_encoder = TextEncoder(sessions["text_encoder"], self._tokenizer)
        self._safety: SafetyChecker | None = None
        self._denoiser: tuple[object, Denoiser] | None = None  # with what it was made for
        self._decoder: tuple[object, Decoder] | None = None
        self._encoder: tuple[object, Encoder] | None = None
        self._busy = threading.Lock()

    @classmethod
    def open(
        cls,
        bundle: str | Path = "shapes",
        *,
        backend: str = "auto",
        precision: str | None = None,
        threads: int | None = None,
        verify: bool = False,
        safety_checker: bool = True,
    ) -> Self:
        """Open a bundle's folder, or a built-in bundle by its name.

        `backend` "auto" is the best there is, `precision` None the fastest it has on this machine, `threads`
        None its own choice; `verify` also checks the sha256 of every file. Graphs that were built for this
        machine before (`allaprima build`) come from the engine cache, the others are compiled now. If the
        bundle has a safety checker, it looks at every picture; `safety_checker` False switches it off.

        Raises BundleError or BackendError.
        """
        opened = open_bundle(resolve(str(bundle)), verify=verify)
        name = choose(backend, opened)

        def opens(role: str) -> Session:
            component = opened.component(role)
            return open_session(
                opened.path(component.graph),
                component,
                name,
                precision=precision,
                threads=threads,
                engines=find_engines(opened, role, name, precision=precision),
            )

        with ExitStack() as undo:
            sessions = {}
            watched = safety_checker and SAFETY in opened.manifest.components
            for role in (*COMPONENTS, SAFETY) if watched else COMPONENTS:
                sessions[role] = opens(role)
                undo.callback(sessions[role].close)
            pipeline = cls(opened, sessions, backend=name, opens=opens)
            undo.pop_all()
        return pipeline

    def close(self) -> None:
        """Let go of graphs and buffers; more than once is fine. RequestError while a picture is painted."""
        with self._exclusive():
            for session in self._sessions.values():
                session.close()
            self._sessions.clear()
            self._text_encoder.close()
            self._denoiser = self._decoder = self._encoder = self._safety = None

    def unload(self) -> None:
        """Let go of weights and buffers until the next picture. RequestError while one is painted."""
        with self._exclusive():
            for session in self._sessions.values():
                session.unload()
            self._text_encoder.close()
            self._denoiser = self._decoder = self._encoder = self._safety = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        seed: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images: int = 1,
        eta: float = 0.0,
        long_prompts: bool = False,
        prompt_weights: bool = False,
        clip_skip: int | None = None,
        guidance_rescale: float = 0.0,
        image: Source | None = None,
        strength: float | None = None,
        variation_seed: int | None = None,
        variation_strength: float = 0.0,
        mask: Source | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        callback: Callback | None = None,
    ) -> Result:
        """Paint `num_images` pictures; None takes the bundle's default, a seed of None a random one.

        Image i is painted with seed + i and is the picture that this seed gives alone. `callback` is told
        after every step; if it raises, painting stops, the exception passes through and the pipeline can be
        used again. `long_prompts`, `prompt_weights`, `clip_skip`, `guidance_rescale`, `image` with `strength`
        for image to image, `mask` for inpainting, and variations: see Request; `sampling`, for what the
        sampler is asked beyond its name, steps and eta, as custom timesteps: see Sampling.

        Raises RequestError, before anything is painted, or BackendError.
        """
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            seed=seed,
            height=height,
            width=width,
            num_images=num_images,
            eta=eta,
            long_prompts=long_prompts,
            prompt_weights=prompt_weights,
            clip_skip=clip_skip,
            guidance_rescale=guidance_rescale,
            image=image,
            strength=strength,
            variation_seed=variation_seed,
            variation_strength=variation_strength,
            mask=mask,
            sampling=sampling,
        )
        return self.paint(request, callback=callback)

    def paint(self, request: Request, *, callback: Callback | None = None) -> Result:
        """As `generate`, for a Request."""
        manifest = self.bundle.manifest
        settings = request.check(manifest)
        table = make_table(
            manifest.scheduler,
            settings.sampler,
            settings.num_inference_steps,
            history=manifest.history,
            eta=settings.eta,
            begin=settings.begin,
            **settings.sampling.arguments(),
        )
        marks = [perf_counter()]
        with self._exclusive():
            if not self._sessions:
                raise BackendError("the pipeline is closed: open it again")
            check_table(table, self._sessions["denoiser"])
            conditioning = plan_conditioning(
                self._tokenizer, settings, self._text_encoder.layers, self._sessions["denoiser"]
            )
            denoiser = self._prepare(settings, conditioning)
            self._encode(denoiser, settings, conditioning)
            streams, kept = self._begin(denoiser, settings, table)
            _tell(callback, "encode", 1, 1, denoiser)
            marks.append(perf_counter())
            _denoise(denoiser, table, streams, kept, callback)
            self._check_finite(denoiser)
            marks.append(perf_counter())
            images, flagged = self._check_safety(self._decode(denoiser, settings, callback))
            marks.append(perf_counter())
        stages = ("encode", "denoise", "decode")
        timings = {stage: marks[i + 1] - marks[i] for i, stage in enumerate(stages)}
        timings["total"] = marks[-1] - marks[0]
        parameters = tuple(self._describe(settings, table, index) for index in range(len(images)))
        warnings = conditioning.warnings + tuple(
            f"picture {index + 1} was flagged by the model's safety checker and is blurred"
            for index, each in enumerate(flagged or ())
            if each
        )
        return Result(images, parameters, timings, warnings, flagged)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RequestError("the pipeline is painting: wait for it, or open another one")
        try:
            yield
        finally:
            self._busy.release()

    def _prepare(self, settings: Settings, conditioning: Conditioning) -> Denoiser:
        """The denoiser of the request's shape: the last one if it fits, for its buffers."""
        manifest = self.bundle.manifest
        latent = manifest.latent
        height, width = settings.height // latent.downscale, settings.width // latent.downscale
        shape = (settings.num_images, latent.channels, height, width)
        length, width = self._text_encoder.condition
        condition = conditioning.count * length, width
        key = (shape, settings.branches, condition)
        if self._denoiser is None or self._denoiser[0] != key:
            self._denoiser = None  # first, so that the old and the new buffers never exist together
            denoiser = Denoiser(
                self._sessions["denoiser"],
                shape,
                branches=settings.branches,
                history=manifest.history,
                condition=condition,
            )
            self._denoiser = key, denoiser
        return self._denoiser[1]

    def _encode(self, denoiser: Denoiser, settings: Settings, conditioning: Conditioning) -> None:
        """Write guidance weights and conditions."""
        scale = settings.guidance_scale
        denoiser.guidance[...] = [[1 - scale], [scale]] if settings.branches == 2 else 1
        if denoiser.guidance_rescale is not None:
            denoiser.guidance_rescale[...] = settings.guidance_rescale if settings.branches == 2 else 0
        conditioning.write(self._text_encoder, denoiser, self._sessions["denoiser"].memory)

    def _begin(self, denoiser: Denoiser, settings: Settings, table: Table) -> tuple[list[Noise], Kept | None]:
        """Put the first latents in place, one stream of noise per image; the streams go on from there.

        A picture's own latents are drawn first, then the noise over them, as in diffusers. What a mask keeps
        of the picture is returned too.
        """
        varied = settings.variation_seed is not None
        streams = [Noise(settings.seed + index * (not varied)) for index in range(settings.num_images)]
        clean, scale = 0.0, table.init_noise_sigma
        latents, noise = np.zeros((2, *denoiser.sample.shape), np.float32)
        if settings.picture is not None:
            if table.levels is None:
                raise RequestError(f"sampler {table.sampler!r} cannot begin with a picture: choose another")
            if settings.mask is None or settings.begin:
                clean, scale = table.levels[0]
            mean, deviation = self._encode_picture(settings.picture, settings.height, settings.width)
            for each, stream in zip(latents, streams, strict=True):
                each[...] = mean + deviation * stream.normal(each.shape)
        for index, (first, stream) in enumerate(zip(noise, streams, strict=True)):
            first[...] = stream.normal(first.shape)
            if settings.variation_seed is not None:
                other = Noise(settings.variation_seed + index).normal(first.shape)
                first[...] = turned(first, other, settings.variation_strength)
            if settings.mask is not None:
                stream.normal(first.shape)  # diffusers draws the latents of the masked picture too
        denoiser.sample[...] = np.float32(clean) * latents + np.float32(scale) * noise
        denoiser.history[...] = 0
        denoiser.push()
        if settings.mask is None:
            return streams, None
        downscale = self.bundle.manifest.latent.downscale
        mask = latent_mask(settings.mask, settings.height, settings.width, downscale)
        return streams, Kept(mask, latents, noise)

    def _encode_picture(self, picture: Image.Image, height: int, width: int) -> tuple[Floats, Floats]:
        """Mean and standard deviation of a picture's latents; the graph is loaded when it is first needed."""
        if ENCODER not in self._sessions:
            if self._opens is None:
                raise RequestError("this pipeline was made without a vae_encoder: it takes no picture")
            self._sessions[ENCODER] = self._opens(ENCODER)
        key = height, width
        if self._encoder is None or self._encoder[0] != key:
            self._encoder = None
            self._encoder = key, Encoder(self._sessions[ENCODER], self.bundle.manifest.latent, *key)
        return self._encoder[1].encode(encodable(picture, height, width))

    def _check_finite(self, denoiser: Denoiser) -> None:
        denoiser.pull()
        if not np.isfinite(denoiser.sample).all():
            raise BackendError(
                f"the picture came out as infinite or not-a-number, in {self.precision} with the backend "
                f"{self.backend}: use a lower guidance_scale, another sampler or a wider precision"
            )

    def _decode(
        self, denoiser: Denoiser, settings: Settings, callback: Callback | None
    ) -> tuple[Image.Image, ...]:
        key = settings.height, settings.width
        if self._decoder is None or self._decoder[0] != key:
            self._decoder = None
            self._decoder = key, Decoder(self._sessions["vae_decoder"], self.bundle.manifest.latent, *key)
        decoder = self._decoder[1]
        images = []
        for lane in range(settings.num_images):
            images.append(Image.fromarray(decoder.decode(denoiser.lane(lane)).copy()))
            _tell(callback, "decode", len(images), settings.num_images, denoiser)
        return tuple(images)

    def _check_safety(
        self, images: tuple[Image.Image, ...]
    ) -> tuple[tuple[Image.Image, ...], tuple[bool, ...] | None]:
        """The pictures, flagged ones blurred, and which those are; None where nobody looks."""
        if SAFETY not in self._sessions:
            return images, None
        if self._safety is None:
            self._safety = SafetyChecker(self.bundle, self._sessions[SAFETY])
        flagged = tuple(self._safety.flags(image) for image in images)
        shown = (blurred(image) if bad else image for image, bad in zip(images, flagged, strict=True))
        return tuple(shown), flagged

    def _describe(self, settings: Settings, table: Table, index: int) -> Parameters:
        known = {field.name for field in fields(Parameters)}
        given = {name: value for name, value in vars(settings).items() if name in known}
        chosen = {"sampler": table.sampler, "sampling": settings.sampling.to_json()}
        return Parameters(
            **{**given, **_seeds(settings, index), **chosen},
            bundle=self.bundle.manifest.name,
            backend=self.backend,
            precision=self.precision,
            version=VERSION,
        )


def _seeds(settings: Settings, index: int) -> dict[str, int | None]:
    """What image `index` alone is painted with."""
    if settings.variation_seed is None:
        return {"seed": settings.seed + index, "variation_seed": None}
    return {"seed": settings.seed, "variation_seed": settings.variation_seed + index}


def _denoise(
    denoiser: Denoiser, table: Table, streams: list[Noise], kept: Kept | None, callback: Callback | None
) -> None:
    total = len(table.timesteps)
    draws = Draws(streams)
    for row in range(total):
        denoiser.write(table, row)
        if table.draws[row]:
            draws.fill(denoiser.noise, float(table.echoes[row]))
            denoiser.push_noise()
        denoiser.step()
        if kept is not None and table.levels is not None:
            denoiser.pull()
            kept.put_back(denoiser.sample, *(table.levels[row + 1] if row + 1 < total else (1.0, 0.0)))
            denoiser.push()
        _tell(callback, "denoise", row + 1, total, denoiser)


def _tell(callback: Callback | None, stage: Stage, step: int, total: int, denoiser: Denoiser) -> None:
    if callback is not None:
        denoiser.pull()
        sample = denoiser.sample.view()
        sample.flags.writeable = False
        callback(Progress(stage, step, total, sample))
