"""Compile every graph of a bundle for one backend on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from allaprima.bundle import (
    BuildError,
    Bundle,
    Component,
    Engine,
    find_engine,
    read_engine,
    seal_engine,
    writing_engine,
)
from allaprima.engine.verify import measure_error
from allaprima.runtime.backends import choose, compile_engine, key_of


@dataclass(frozen=True)
class Progress:
    """Where a build is: a stage in words, and how many of `total` are done before it."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Built:
    """One component's engine; `reused` says that the cache had it already."""

    component: str
    folder: Path
    engine: Engine
    reused: bool


def build_bundle(
    bundle: Bundle,
    *,
    backend: str = "auto",
    precision: str | None = None,
    cache: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[Built, ...]:
    """Make sure that the cache holds a verified engine of every component.

    Args:
        bundle: an opened bundle.
        backend: "auto" or a backend's name.
        precision: "fp32", "fp16", "bf16"; None is the backend's choice for this machine.
        cache: the cache's folder; None is the user's.
        progress: called before each stage.

    Raises:
        BackendError: the backend does not work here, or cannot compute a graph in the precision.
        BuildError: the cache cannot be written, or an engine's outputs are not those of its graph.
    """
    name = choose(backend)
    built = []
    names = tuple(bundle.manifest.components)
    for index, component in enumerate(names):
        stages = _Stages(progress, component, index, len(names))
        built.append(_build_component(bundle, component, name, precision, cache, stages))
    return tuple(built)


class _Stages:
    """Three stages per component: compile, verify, save."""

    def __init__(
        self, progress: Callable[[Progress], None] | None, component: str, index: int, count: int
    ) -> None:
        self.progress, self.component, self.done, self.total = progress, component, 3 * index, 3 * count

    def enter(self, stage: str) -> None:
        if self.progress is not None:
            self.progress(Progress(f"{self.component}: {stage}", self.done, self.total))
        self.done += 1


def _build_component(
    bundle: Bundle, name: str, backend: str, precision: str | None, cache: Path | None, stages: _Stages
) -> Built:
    component = bundle.component(name)
    key = key_of(bundle, name, backend, precision=precision)
    if found := find_engine(key, cache):
        return Built(name, found.parent, read_engine(found.parent), reused=True)
    with writing_engine(key, cache) as folder:
        stages.enter("compile")
        started = time.perf_counter()
        main = _compile(bundle, component, folder, backend, key.precision)
        seconds = time.perf_counter() - started
        stages.enter("verify")
        error = measure_error(bundle, name, main, backend, key.precision)
        stages.enter("save")
        engine = seal_engine(
            folder, key, bundle=bundle.manifest.name, main=main.name, seconds=seconds, error=error
        )
    return Built(name, folder.with_name(key.folder), engine, reused=False)


def _compile(bundle: Bundle, component: Component, folder: Path, backend: str, precision: str) -> Path:
    try:
        return compile_engine(bundle.path(component.graph), component, folder, backend, precision=precision)
    except OSError as cause:
        raise BuildError(f"the engine cache {folder.parent} cannot be written: {cause.strerror}") from cause
