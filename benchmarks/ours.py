"""Our own runtime as a contestant."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allaprima.benchmarks.clock import TRANSFER, EngineClock
from allaprima.benchmarks.contestants import Contestant, Painted
from allaprima.benchmarks.plan import Settings, Work
from allaprima.bundle import AllaprimaError, BackendError, open_bundle, resolve

ON_CPU = ("openvino", "ort")
"""The backends that use no GPU."""
TEXT = ("text_encoder", "text_encoder_2", "prior")
"""The components that turn a prompt into conditions."""


@dataclass(frozen=True)
class Way:
    """A backend and the precision it computes in; `refused` says why there is none."""

    backend: str
    precision: str
    refused: str = ""


def ways(bundle: str, backends: Sequence[str], precisions: Sequence[str]) -> list[Way]:
    """Every backend in every precision; "auto" is what `generate` would take, "all" is what works here.

    To be asked in another process, which imports the drivers. Raises BackendError for an unknown name.
    """
    from allaprima.runtime.backends import PRECISIONS, choose, engine_precision
    from allaprima.runtime.backends import backends as all_backends

    opened, there = open_bundle(resolve(bundle)), all_backends()
    for name, known in (
        *((name, ("auto", "all", *(info.name for info in there))) for name in backends),
        *((name, ("auto", *PRECISIONS)) for name in precisions),
    ):
        if name not in known:
            raise BackendError(f"unknown backend or precision '{name}': choose from {', '.join(known)}")
    working = [info.name for info in there if info.available]
    names = [found for name in backends for found in (working if name == "all" else [name])]
    found: dict[tuple[str, str], Way] = {}
    for name in names:
        for precision in precisions or ("auto",):
            try:
                chosen = choose(name, opened)
                exact = engine_precision(opened.component("denoiser"), chosen, precision)
                way = Way(chosen, exact)
            except AllaprimaError as error:
                way = Way(name, precision, str(error))
            found.setdefault((way.backend, way.precision), way)
    return list(found.values())


def contestant(bundle: str, way: Way, label: str = "", *, fixed: bool = False) -> Contestant:
    """Our runtime on a backend; `label` tells it apart from another bundle's, `fixed` builds for shapes.

    What runs only engines is built for just the shapes that it is to paint, too.
    """
    from allaprima.runtime.flavours import FLAVOURS

    exact = fixed or way.backend in FLAVOURS
    name = "-".join(
        part for part in ("allaprima", label, way.backend, way.precision, "fixed" * fixed) if part
    )
    return Contestant(
        name,
        way.precision,
        functools.partial(open_pipeline, bundle, way.backend, way.precision),
        functools.partial(command, bundle, way.backend, way.precision),
        way.backend,
        bundle,
        gpu=way.backend not in ON_CPU,
        build=functools.partial(build, bundle, way.backend, way.precision) if exact else None,
    )


def own_cache(contestant: Contestant, folder: Path) -> Path | None:
    """A cache of the contestant's own: engines that a user built may be of other threads.

    Those for a GPU take long to build, so they stay in the user's.
    """
    return folder / contestant.name if contestant.backend in ON_CPU else None


class PipelinePainter:
    """A pipeline whose engines are timed."""

    def __init__(self, bundle: str, backend: str, precision: str, settings: Settings) -> None:
        from allaprima.runtime import Pipeline

        self.settings, self._clock = settings, EngineClock()
        self._pipeline = Pipeline.open(
            bundle,
            backend=backend,
            precision=precision,
            threads=settings.threads if backend in ON_CPU else None,
            safety_checker=False,
            embedding_cache=0,  # texts are part of what is measured
            watch=self._clock.watch,
        )

    def paint(self, work: Work) -> Painted:
        """See Painter."""
        settings = self.settings
        result = self._pipeline.generate(
            settings.prompt,
            num_inference_steps=work.steps,
            guidance_scale=settings.guidance_scale,
            sampler=settings.sampler,
            seed=settings.seed,
            height=work.height,
            width=work.width,
            num_images=work.batch,
        )
        engine = self._clock.take()
        times = result.timings
        stages = {"text": times["encode"], "denoise": times["denoise"], "decode": times["decode"]}
        if self._clock.on_device:
            # The host is ahead of the device: what it spends before the loop is not what texts take there.
            text = sum(share.seconds for role, share in engine.items() if role in TEXT)
            stages["text"], stages["denoise"] = text, max(0.0, times["encode"] + times["denoise"] - text)
        if TRANSFER in engine:
            stages["transfer"] = engine.pop(TRANSFER).seconds
        return Painted(result.images, stages, engine)

    def host_memory(self) -> int | None:
        """See Painter: it paints in this process."""
        return None

    def close(self) -> None:
        """See Painter."""
        self._pipeline.close()


def open_pipeline(
    bundle: str, backend: str, precision: str, settings: Settings, works: Sequence[Work]
) -> PipelinePainter:
    """Open as `allaprima generate` does, with the engines that the cache has."""
    return PipelinePainter(bundle, backend, precision, settings)


def build(bundle: str, backend: str, precision: str, works: Sequence[Work]) -> None:
    """Engines for the shapes of all works, kept in the cache.

    Raises BackendError, BuildError, RequestError.
    """
    from allaprima.engine import build_bundle

    sizes = list(dict.fromkeys((work.width, work.height) for work in works))
    batches = [work.batch for work in works]
    build_bundle(
        open_bundle(resolve(bundle)),
        backend=backend,
        precision=precision,
        sizes=sizes,
        batch=(min(batches), max(batches)),
    )


def build_general(bundle: str, backend: str, precision: str, cache: Path) -> bool:
    """Fill a cache with what `allaprima build` makes without further words; False where there is nothing to.

    Raises BackendError, BuildError.
    """
    from allaprima.engine import build_bundle
    from allaprima.runtime.backends import compiles

    if not compiles(backend):
        return False
    build_bundle(open_bundle(resolve(bundle)), backend=backend, precision=precision, cache=cache)
    return True


def command(
    bundle: str, backend: str, precision: str, settings: Settings, work: Work, picture: Path
) -> list[str]:
    """`allaprima generate` to a file."""
    sampler = [] if settings.sampler is None else ["--sampler", settings.sampler]
    return [
        *(sys.executable, "-m", "allaprima.cli", "generate", bundle, settings.prompt, "--backend", backend),
        *("--precision", precision, "--steps", str(work.steps), "--size", f"{work.width}x{work.height}"),
        *("--guidance", str(settings.guidance_scale), "--seed", str(settings.seed), *sampler),
        *("--threads", str(settings.threads)) * (backend in ON_CPU),
        *("--no-safety-checker", "--quiet", "-o", os.fspath(picture)),
    ]
