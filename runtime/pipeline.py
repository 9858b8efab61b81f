"""Text to pictures."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Self, Unpack

from allaprima.bundle import (
    BackendError,
    Bundle,
    RequestError,
    open_bundle,
    resolve,
)
from allaprima.runtime.backends import choose
from allaprima.runtime.components import Components, weigh_files
from allaprima.runtime.embeddings import EmbeddingCache
from allaprima.runtime.families import needed, open_family
from allaprima.runtime.finite import check_latents
from allaprima.runtime.footprint import Footprint, parse_bytes
from allaprima.runtime.lanes import Lanes, powers_of_two
from allaprima.runtime.loop import Callback, denoise, run_out, tell
from allaprima.runtime.memory import HostMemory, trim
from allaprima.runtime.noise import Draws
from allaprima.runtime.opener import Opener
from allaprima.runtime.painter import Painter
from allaprima.runtime.painting import Painting, Shape, each_alone, plan_table
from allaprima.runtime.preview import Previewer, check_preview
from allaprima.runtime.request import Options, Request
from allaprima.runtime.result import Result
from allaprima.runtime.safety import COMPONENT as SAFETY
from allaprima.runtime.safety import warn_flagged
from allaprima.runtime.session import Session
from allaprima.runtime.settings import Settings
from allaprima.runtime.stages import check_table
from allaprima.runtime.staging import Staging

EMBEDDING_CACHE = 64 << 20
"""Bytes of text that was encoded before, which are kept unless said otherwise."""


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
        memory_limit: int | None = None,
        weigh: Callable[[str], Footprint] | None = None,
        embedding_cache: int = EMBEDDING_CACHE,
    ) -> None:
        """Take over opened sessions of text encoders, denoiser and vae_decoder; `open` does it all.

        `opens` opens another component when a request first needs it: the vae_encoder or the image_encoder,
        for pictures that are handed in, or the graphs of a cached step. `weigh` says what a component takes
        of a `memory_limit` in bytes; without it that is the size of its files. `embedding_cache` in bytes.

        Raises BundleError if the bundle is of another family or its tokenizer cannot be read, BackendError if
        a component does not fit into the limit.
        """
        self.bundle = bundle
        self.backend = backend
        self.precision = _arithmetic(bundle, sessions["denoiser"])
        weigh = weigh or functools.partial(weigh_files, bundle)
        self._components = Components(sessions, opens=opens, limit=memory_limit, weigh=weigh)
        self._stages = Staging(bundle, self._components)
        self._embeddings = EmbeddingCache(embedding_cache)
        sessions = self._components.sessions
        self._family = open_family(bundle, sessions, self._components.open, self._embeddings)
        self._painter = Painter(bundle, self._stages, backend=backend, precision=self.precision)
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
        memory_limit: int | str | None = None,
        embedding_cache: int | str = EMBEDDING_CACHE,
        watch: Callable[[str, Session], Session] | None = None,
    ) -> Self:
        """Open a bundle's folder, or a built-in bundle by its name.

        `backend` "auto" is the best there is, `precision` None the fastest it has on this machine, `threads`
        None its own choice; `verify` also checks the sha256 of every file. Graphs that were built for this
        machine before (`allaprima build`) come from the engine cache, the others are compiled now. If the
        bundle has a safety checker, it looks at every picture; `safety_checker` False switches it off.
        `watch` is given each component's session as it is opened and returns the one to use, for measuring.

        `memory_limit`, in bytes or as "8GB" or "8GiB", is what the components may take together: they are
        loaded when they are needed, and those that were not used for longest make room. `embedding_cache`
        bounds the memory for prompts that were encoded before, which are not encoded again; 0 is off.

        Raises BundleError, or BackendError, also if the limit is too small for one of the components.
        """
        limit = None if memory_limit is None else parse_bytes("memory_limit", memory_limit)
        kept = parse_bytes("embedding_cache", embedding_cache)
        opened = open_bundle(resolve(str(bundle)), verify=verify)
        name = choose(backend, opened)

        opener = Opener(opened, name, precision=precision, threads=threads, memory_limit=limit, watch=watch)
        with ExitStack() as undo:
            sessions = {}
            watched = (SAFETY,) if safety_checker and SAFETY in opened.manifest.components else ()
            for role in (*needed(opened.manifest), *watched):
                sessions[role] = opener.open(role)
                undo.callback(sessions[role].close)
            pipeline = cls(
                opened,
                sessions,
                backend=name,
                opens=opener.open,
                memory_limit=limit,
                weigh=opener.weigh,
                embedding_cache=kept,
            )
            undo.pop_all()
        return pipeline

    def close(self) -> None:
        """Let go of graphs and buffers; more than once is fine. RequestError while a picture is painted."""
        with self._exclusive():
            self._components.close()
            self._embeddings.clear()
            self._drop()

    def unload(self) -> None:
        """Let go of weights and buffers until the next picture. RequestError while one is painted.

        Embeddings of prompts stay.
        """
        with self._exclusive():
            self._components.unload()
            self._drop()

    def _drop(self) -> None:
        self._family.unload()
        self._stages.drop()
        trim()  # last, since what was bound keeps its weights

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
            self._stages.drop()
            raise BackendError(
                "there is not enough memory for this request: ask for fewer or smaller pictures"
            ) from cause

    def _paint(self, request: Request, callback: Callback | None, preview_every: int | None) -> Result:
        manifest = self.bundle.manifest
        settings = self._family.settle(request.check(manifest))
        preview = check_preview(preview_every, manifest, heard=callback is not None)
        table = plan_table(manifest, settings)
        marks = [perf_counter()]
        with self._open() as sessions:
            self._components.begin()
            check_table(table, sessions["denoiser"])
            told = self._family.plan(settings)
            denoiser = self._stages.denoiser(settings, told.length)
            if self._components.limited and settings.output_type != "latent":
                self._stages.decoder(settings)  # so that it is known before painting if it does not fit
            parts = self._painter.begin(settings, table, told, denoiser)
            streams, kept = run_out(parts, lambda part: tell(callback, *part))
            tell(callback, "encode", 1, 1, denoiser)
            marks.append(perf_counter())
            previewer = Previewer(preview, preview_every, kept) if preview and preview_every else None
            denoise(denoiser, table, streams, kept, callback, previewer, settings.cache_interval)
            check_latents(denoiser, sessions)
            marks.append(perf_counter())
            latents, images, flagged = self._painter.end(denoiser, settings, callback)
            marks.append(perf_counter())
            memory = self._components.report()
        stages = ("encode", "denoise", "decode")
        timings = {stage: marks[i + 1] - marks[i] for i, stage in enumerate(stages)}
        timings["total"] = marks[-1] - marks[0]
        parameters = tuple(
            self._painter.describe(settings, table, index) for index in range(settings.num_images)
        )
        return Result(
            images, parameters, timings, told.warnings + warn_flagged(flagged), flagged, latents, memory
        )

    def settle(self, request: Request | Settings) -> tuple[Settings, ...]:
        """What is to be painted for a request, one picture each, to be given to `prepare`.

        The settings of a request that was checked before have its random seeds. Raises RequestError, also for
        what cannot be painted a step at a time.
        """
        settings = request.check(self.bundle.manifest) if isinstance(request, Request) else request
        return each_alone(self._family.settle(settings))

    def prepare(self, settings: Settings, *, preview_every: int | None = None) -> Painting:
        """Do all that comes before the first step of one picture, which is then painted in `lanes`.

        Raises RequestError or BackendError.
        """
        return run_out(self.prepare_in_parts(settings, preview_every=preview_every))

    def prepare_in_parts(
        self, settings: Settings, *, preview_every: int | None = None
    ) -> Generator[None, None, Painting]:
        """As `prepare`, but stops after each step of a prior, so that others can take theirs.

        Until it has ended, no other picture may be prepared.
        """
        manifest = self.bundle.manifest
        preview = check_preview(preview_every, manifest, heard=True)
        table = plan_table(manifest, settings)
        started = perf_counter()
        with self._open() as sessions:
            check_table(table, sessions["denoiser"])
            told = self._family.plan(settings)
            shape = Shape(settings.height, settings.width, settings.branches, told.length)
            state = self._stages.make_denoiser(shape, 1, bound=False)
            parts = self._painter.begin(settings, table, told, state)
        seconds = perf_counter() - started
        while True:
            started = perf_counter()
            with self._open():
                try:
                    next(parts)
                except StopIteration as end:
                    streams, kept = end.value
                    break
            seconds += perf_counter() - started
            if not self._components.limited:  # or the weights would come and go with each step
                yield
        return Painting(
            settings,
            table,
            shape,
            state,
            Draws(streams),
            kept,
            Previewer(preview, preview_every, kept) if preview and preview_every else None,
            told.warnings,
            encoding=seconds + perf_counter() - started,
        )

    def lanes(self, shape: Shape, most: int) -> Lanes:
        """Where up to `most` pictures of a shape, which were prepared, take their steps together.

        On a device, where every number of lanes has memory and a graph of its own, there are only powers of
        two of them, and some may idle.
        """
        on_host = isinstance(self._components.sessions["denoiser"].memory, HostMemory)
        sizes = None if on_host else powers_of_two(most)
        return Lanes(lambda lanes: self._stages.make_denoiser(shape, lanes), sizes)

    def wait(self) -> None:
        """Wait until the device has done all that was asked of it. Raises BackendError if it failed."""
        self._components.sessions["denoiser"].memory.synchronize()

    def finish(self, painting: Painting) -> Result:
        """The picture of a painting that took its last step and was released. Raises BackendError."""
        started = perf_counter()
        with self._open() as sessions:
            check_latents(painting.state, sessions)
            latents, images, flagged = self._painter.end(painting.state, painting.settings, None)
        decoding = perf_counter() - started
        timings = {"encode": painting.encoding, "denoise": painting.denoising, "decode": decoding}
        timings["total"] = sum(timings.values())
        parameters = (self._painter.describe(painting.settings, painting.table, 0),)
        warnings = painting.warnings + warn_flagged(flagged)
        return Result(images, parameters, timings, warnings, flagged, latents)

    @property
    def limited(self) -> bool:
        """Whether weights come and go, to stay within a limit of memory."""
        return self._components.limited

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RequestError("the pipeline is painting: wait for it, or open another one")
        try:
            for session in self._components.sessions.values():
                session.memory.attach()
            yield
        finally:
            self._busy.release()

    @contextmanager
    def _open(self) -> Iterator[Mapping[str, Session]]:
        """The sessions, for this thread alone."""
        with self._exclusive():
            if not self._components.sessions:
                raise BackendError("the pipeline is closed: open it again")
            yield self._components.sessions


def _arithmetic(bundle: Bundle, denoiser: Session) -> str:
    """What the denoiser computes in: "bf16", or "int8+bf16" where its large layers are quantized."""
    made = bundle.component("denoiser").quantization
    return denoiser.precision if made is None else f"{made.dtype}+{denoiser.precision}"
