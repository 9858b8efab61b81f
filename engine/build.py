"""Compile every graph of a bundle for one backend."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from allaprima.bundle import (
    BackendError,
    BuildError,
    Bundle,
    Engine,
    EngineKey,
    RequestError,
    cache_folder,
    find_engine,
    read_engine,
    seal_engine,
    why_missing,
    writing_engine,
)
from allaprima.engine.options import Options
from allaprima.engine.shapes import Size
from allaprima.engine.toolchains import Job, Native, TensorRT, Toolchain
from allaprima.runtime.backends import backends, choose, compiles
from allaprima.runtime.cuda import current_device
from allaprima.runtime.flavours import FLAVOURS, flavour_for


@dataclass(frozen=True)
class Progress:
    """Where a build is: a stage in words, and how many of `total` are done before it."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Built:
    """One component's engine.

    `reused` says that the cache had it already; else `reason` says why what the cache had would not do, ""
    if it had nothing of the kind.
    """

    component: str
    folder: Path
    engine: Engine
    reused: bool
    reason: str = ""


def build_bundle(
    bundle: Bundle,
    *,
    backend: str = "auto",
    precision: str | None = None,
    sizes: Sequence[Size] = (),
    batch: tuple[int, int] = (1, 1),
    options: Options | None = None,
    components: Sequence[str] = (),
    cache: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[Built, ...]:
    """Make sure that the cache holds verified engines of every component, or of some.

    Args:
        bundle: an opened bundle.
        backend: "auto" or a backend's name.
        precision: "fp32", "fp16", "bf16"; None is the backend's choice for this machine.
        sizes: width and height of pictures in pixels. The TensorRT family compiles for these alone, none is
            the bundle's default; OpenVINO for all, and for up to two of these alone besides.
        batch: smallest and largest number of pictures in a batch.
        options: of the TensorRT family.
        components: names of those to build; none is all.
        cache: the cache's folder; None is the user's.
        progress: called before each stage.

    Raises:
        BackendError: the backend does not work here, or cannot compute a graph in the precision.
        BuildError: the cache cannot be written, or an engine's outputs are not those of its graph.
        RequestError: sizes, options or components that the backend or the model does not have.
    """
    known = bundle.manifest.components
    if unknown := [name for name in components if name not in known]:
        raise RequestError(f"the bundle has no component {unknown[0]!r}: choose from {', '.join(known)}")
    toolchain = _toolchain(bundle, backend, precision, sizes, batch, options)
    built = []
    jobs = [job for job in toolchain.jobs() if not components or job.component in components]
    for index, job in enumerate(jobs):
        stages = _Stages(progress, job.component, len(toolchain.stages), index, len(jobs))
        built.append(_build(bundle, job, toolchain, cache, stages))
    return tuple(built)


def _toolchain(
    bundle: Bundle,
    backend: str,
    precision: str | None,
    sizes: Sequence[Size],
    batch: tuple[int, int],
    options: Options | None,
) -> Toolchain:
    backend = _resolve(backend)
    if backend in FLAVOURS:
        return TensorRT(bundle, backend, precision, sizes, batch, options or Options())
    if not compiles(backend):
        raise RequestError(f"{backend} compiles nothing ahead of time: use the bundle as it is")
    if options is not None:
        raise RequestError(f"{backend} has no such options: they belong to {' and '.join(FLAVOURS)}")
    return Native(bundle, backend, precision, sizes, batch)


def _resolve(backend: str) -> str:
    """For "auto" what suits this machine's GPU if it also runs here, else the runtime's choice."""
    if backend == "auto":
        with suppress(BackendError):
            flavour = flavour_for(current_device().capability)
            if any(info.name == flavour and info.available for info in backends()):
                return str(flavour)
    return backend if backend in FLAVOURS else choose(backend)


class _Stages:
    """The toolchain's stages for one component."""

    def __init__(
        self,
        progress: Callable[[Progress], None] | None,
        component: str,
        stages: int,
        index: int,
        count: int,
    ) -> None:
        self.progress, self.component = progress, component
        self.done, self.total = stages * index, stages * count

    def enter(self, stage: str) -> None:
        self.tell(stage)
        self.done += 1

    def tell(self, stage: str) -> None:
        if self.progress is not None:
            self.progress(Progress(f"{self.component}: {stage}", self.done, self.total))


def _build(bundle: Bundle, job: Job, toolchain: Toolchain, cache: Path | None, stages: _Stages) -> Built:
    key = toolchain.key(job)
    if found := find_engine(key, cache):
        return Built(job.component, found.parent, read_engine(found.parent), reused=True)
    with _alone(key, cache, stages):
        if found := find_engine(key, cache):  # another process has built it meanwhile
            return Built(job.component, found.parent, read_engine(found.parent), reused=True)
        reason = why_missing(key, cache)
        with writing_engine(key, cache) as folder:
            started = time.perf_counter()
            try:
                main = toolchain.compile(job, folder, stages.enter)
            except OSError as cause:
                raise _unwritable(folder.parent, cause) from cause
            seconds = time.perf_counter() - started
            stages.enter("verify")
            error = toolchain.verify(job, main)
            stages.enter("save")
            engine = seal_engine(
                folder, key, bundle=bundle.manifest.name, main=main.name, seconds=seconds, error=error
            )
    return Built(job.component, folder.with_name(key.folder), engine, reused=False, reason=reason)


@contextmanager
def _alone(key: EngineKey, cache: Path | None, stages: _Stages) -> Iterator[None]:
    """Holds the lock of an engine: of two processes that want it, one builds and the other waits."""
    lock = _lock(key.folder, cache or cache_folder())
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            stages.tell("wait for another process that builds it")
            lock.acquire()
    except OSError as cause:
        raise _unwritable(Path(lock.lock_file).parent, cause) from cause
    try:
        yield
    finally:
        _remove(lock)
        lock.release()


def is_being_built(folder: Path) -> bool:
    """Whether a process, this one included, is building into this unfinished folder of a cache."""
    name = re.fullmatch(r"\.(.+-[0-9a-f]{24})\.\w+\.partial", folder.name)
    if name is None:
        return False
    lock = _lock(name[1], folder.parent)
    try:
        with lock.acquire(timeout=0):
            _remove(lock)
            return False
    except (Timeout, OSError):
        return True


def _lock(name: str, cache: Path) -> FileLock:
    return FileLock(cache / f".{name}.lock", mode=0o600)


def _remove(lock: FileLock) -> None:
    """Take a held lock's file away. Who waits for it goes on, and finds the engine, or builds it."""
    with suppress(OSError):
        os.unlink(lock.lock_file)


def _unwritable(cache: Path, cause: OSError) -> BuildError:
    return BuildError(
        f"the engine cache {cache} cannot be written ({cause.strerror}): "
        "set ALLAPRIMA_CACHE to another folder"
    )
