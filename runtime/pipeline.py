"""Text to pictures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Self, Unpack

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from allaprima.bundle import (
    VERSION,
    BackendError,
    Bundle,
    RequestError,
    open_bundle,
    resolve,
)
from allaprima.runtime.backends import choose, find_engines, open_session
from allaprima.runtime.conventions import conventions_of
from allaprima.runtime.families import needed, open_family
from allaprima.runtime.finite import check_latents
from allaprima.runtime.inpainting import Kept
from allaprima.runtime.latents import Beginning
from allaprima.runtime.noise import Draws, Noise
from allaprima.runtime.preview import Previewer, check_preview
from allaprima.runtime.request import Options, Request
from allaprima.runtime.result import Parameters, Progress, Result, Stage
from allaprima.runtime.safety import COMPONENT as SAFETY
from allaprima.runtime.safety import SafetyChecker, blurred
from allaprima.runtime.samplers import Table, make_table, take_part
from allaprima.runtime.session import Session
from allaprima.runtime.settings import Settings
from allaprima.runtime.stages import Decoder, Denoiser, Encoder, check_table

Callback = Callable[[Progress], None]

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
        """Take over opened sessions of text encoders, denoiser and vae_decoder; `open` does it all.

        `opens` opens another component when a request first needs it: the vae_encoder, for pictures that are
        handed in.

        Raises BundleError if the bundle is of another family or its tokenizer cannot be read.
        """
        self.bundle = bundle
        self.backend = backend
        self.precision = sessions["denoiser"].precision
        self._sessions = dict(sessions)
        self._opens = opens
        self._family = open_family(bundle, sessions)
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
        watch: Callable[[str, Session], Session] | None = None,
    ) -> Self:
        """Open a bundle's folder, or a built-in bundle by its name.

        `backend` "auto" is the best there is, `precision` None the fastest it has on this machine, `threads`
        None its own choice; `verify` also checks the sha256 of every file. Graphs that were built for this
        machine before (`allaprima build`) come from the engine cache, the others are compiled now. If the
        bundle has a safety checker, it looks at every picture; `safety_checker` False switches it off.
        `watch` is given each component's session as it is opened and returns the one to use, for measuring.

        Raises BundleError or BackendError.
        """
        opened = open_bundle(resolve(str(bundle)), verify=verify)
        name = choose(backend, opened)

        def opens(role: str) -> Session:
            component = opened.component(role)
            session = open_session(
                opened.path(component.graph),
                component,
                name,
                precision=precision,
                threads=threads,
                engines=find_engines(opened, role, name, precision=precision),
            )
            return session if watch is None else watch(role, session)

        with ExitStack() as undo:
            sessions = {}
            watched = (SAFETY,) if safety_checker and SAFETY in opened.manifest.components else ()
            for role in (*needed(opened.manifest), *watched):
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
            self._family.unload()
            self._denoiser = self._decoder = self._encoder = self._safety = None

    def unload(self) -> None:
        """Let go of weights and buffers until the next picture. RequestError while one is painted."""
        with self._exclusive():
            for session in self._sessions.values():
                session.unload()
            self._family.unload()
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
        callback: Callback | None = None,
        preview_every: int | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Paint pictures; `options` are the fields of a Request, which says what each does.

        Image i is painted with seed + i and is the picture that this seed gives alone. `callback` is told
        after every step; if it raises, painting stops, the exception passes through and the pipeline can be
        used again. After every `preview_every` steps (calls of the model, as `Progress` counts them; None or
        0 is never) it also gets previews, which cost next to nothing.

        Raises RequestError, before anything is painted, or BackendError.
        """
        return self.paint(Request(prompt, **options), callback=callback, preview_every=preview_every)

    def paint(
        self, request: Request, *, callback: Callback | None = None, preview_every: int | None = None
    ) -> Result:
        """As `generate`, for a Request."""
        try:
            return self._paint(request, callback, preview_every)
        except MemoryError as cause:
            self._denoiser = self._decoder = self._encoder = None
            raise BackendError(
                "there is not enough memory for this request: ask for fewer or smaller pictures"
            ) from cause

    def _paint(self, request: Request, callback: Callback | None, preview_every: int | None) -> Result:
        settings = self._family.settle(request.check(self.bundle.manifest))
        preview = check_preview(preview_every, self.bundle.manifest, heard=callback is not None)
        table = self._plan(settings)
        marks = [perf_counter()]
        with self._exclusive():
            if not self._sessions:
                raise BackendError("the pipeline is closed: open it again")
            check_table(table, self._sessions["denoiser"])
            told = self._family.plan(settings)
            denoiser = self._prepare(settings, told.length)
            manifest = self.bundle.manifest
            beginning = Beginning(
                settings,
                table,
                manifest.latent,
                lambda: self._picture_encoder(settings),
                conventions_of(manifest),
            )
            told.draw(beginning.streams)
            kept = beginning.write(denoiser)
            _guide(denoiser, settings)
            told.write(denoiser)
            _tell(callback, "encode", 1, 1, denoiser)
            marks.append(perf_counter())
            previewer = Previewer(preview, preview_every, kept) if preview and preview_every else None
            _denoise(denoiser, table, beginning.streams, kept, callback, previewer)
            check_latents(denoiser, self._sessions)
            marks.append(perf_counter())
            latents = denoiser.sample.copy() if settings.output_type == "latent" else None
            images, flagged = self._check_safety(
                self._decode(denoiser, settings, callback) if latents is None else ()
            )
            marks.append(perf_counter())
        stages = ("encode", "denoise", "decode")
        timings = {stage: marks[i + 1] - marks[i] for i, stage in enumerate(stages)}
        timings["total"] = marks[-1] - marks[0]
        parameters = tuple(self._describe(settings, table, index) for index in range(settings.num_images))
        warnings = told.warnings + tuple(
            f"picture {index + 1} was flagged by the model's safety checker and is blurred"
            for index, each in enumerate(flagged or ())
            if each
        )
        return Result(images, parameters, timings, warnings, flagged, latents)

    def _plan(self, settings: Settings) -> Table:
        """The rows that the request takes of its sampler's table."""
        manifest = self.bundle.manifest

        def make(begin: int) -> Table:
            return make_table(
                manifest.scheduler,
                settings.sampler,
                settings.num_inference_steps,
                history=manifest.history,
                eta=settings.eta,
                begin=begin,
                **settings.sampling.arguments(),
            )

        start, end = settings.denoising_start, settings.denoising_end
        if start is None and end is None:
            return make(settings.begin)
        trained = int(manifest.scheduler.get("num_train_timesteps", 1000))
        return take_part(lambda begin: make(begin + settings.begin), trained, start, end)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RequestError("the pipeline is painting: wait for it, or open another one")
        try:
            yield
        finally:
            self._busy.release()

    def _prepare(self, settings: Settings, length: int) -> Denoiser:
        """The denoiser of the request's shape: the last one if it fits, for its buffers."""
        manifest = self.bundle.manifest
        latent = manifest.latent
        height, width = settings.height // latent.downscale, settings.width // latent.downscale
        shape = (settings.num_images, latent.channels, height, width)
        key = (shape, settings.branches, length)
        if self._denoiser is None or self._denoiser[0] != key:
            self._denoiser = None  # first, so that the old and the new buffers never exist together
            denoiser = Denoiser(
                self._sessions["denoiser"],
                shape,
                branches=settings.branches,
                history=manifest.history,
                length=length,
            )
            self._denoiser = key, denoiser
        return self._denoiser[1]

    def _picture_encoder(self, settings: Settings) -> Encoder:
        """The image encoder of the request's size; the graph is loaded when it is first needed."""
        if ENCODER not in self._sessions:
            if self._opens is None:
                raise RequestError("this pipeline was made without a vae_encoder: it takes no picture")
            self._sessions[ENCODER] = self._opens(ENCODER)
        key = settings.height, settings.width
        if self._encoder is None or self._encoder[0] != key:
            self._encoder = None
            self._encoder = key, Encoder(self._sessions[ENCODER], self.bundle.manifest.latent, *key)
        return self._encoder[1]

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


def _guide(denoiser: Denoiser, settings: Settings) -> None:
    """Write the weights of the guidance branches."""
    scale = settings.guidance_scale
    denoiser.guidance[...] = [[1 - scale], [scale]] if settings.branches == 2 else 1
    if denoiser.guidance_rescale is not None:
        denoiser.guidance_rescale[...] = settings.guidance_rescale if settings.branches == 2 else 0


def _denoise(
    denoiser: Denoiser,
    table: Table,
    streams: list[Noise],
    kept: Kept | None,
    callback: Callback | None,
    previewer: Previewer | None,
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
            level = table.levels[row + 1] if row + 1 < len(table.levels) else (1.0, 0.0)
            kept.put_back(denoiser.sample, *level)
            denoiser.push()
        if callback is not None:
            denoiser.pull()
            previews = () if previewer is None else previewer.paint(denoiser, table, row)
            callback(Progress("denoise", row + 1, total, _seen(denoiser), previews))


def _tell(callback: Callback | None, stage: Stage, step: int, total: int, denoiser: Denoiser) -> None:
    if callback is not None:
        denoiser.pull()
        callback(Progress(stage, step, total, _seen(denoiser)))


def _seen(denoiser: Denoiser) -> NDArray[np.float32]:
    """The latents, which a callback must not change."""
    sample = denoiser.sample.view()
    sample.flags.writeable = False
    return sample
