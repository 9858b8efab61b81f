"""The backends there are, and opening a graph with one."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from allaprima.bundle import (
    BackendError,
    Bundle,
    Component,
    EngineFile,
    EngineKey,
    Profile,
    engine_key,
    find_engine,
    matching_engines,
)
from allaprima.runtime.footprint import Footprint
from allaprima.runtime.session import Session

PRECISIONS = ("fp32", "fp16", "bf16")


class Driver(Protocol):
    """What the module of a backend offers."""

    def version(self) -> str:
        """The version of the driver package; raises whatever its import raises."""

    def precisions(self) -> tuple[str, ...]:
        """What it can compute in on this machine, the default first."""

    def converts(self) -> bool:
        """Whether it computes a graph in any of these precisions, or only in the one it was exported in."""

    def device(self) -> str:
        """The processor that it compiles for, in words that differ where its code would."""

    def open_session(
        self,
        graph: Path,
        component: Component,
        *,
        precision: str | None,
        threads: int | None,
        engines: Sequence[EngineFile],
        memory_limit: int | None,
    ) -> Session:
        """See `open_session` below."""

    def footprint(
        self, graph: Path, component: Component, engines: Sequence[EngineFile], *, precision: str
    ) -> Footprint:
        """See `footprint` below."""


class Compiler(Driver, Protocol):
    """A driver that compiles a graph on the machine that will run it."""

    def compile_engine(
        self, graph: Path, component: Component, folder: Path, *, precision: str, profile: Profile | None
    ) -> Path:
        """See `compile_engine` below."""


class Loader(Driver, Protocol):
    """A driver that runs only engines that were built before, for the shapes that they were built for."""

    def serves(self, device: str) -> bool:
        """Whether an engine that was built for `device`, in the words of its key, runs on this machine."""


@dataclass(frozen=True)
class BackendInfo:
    """A backend and whether it works here.

    `version`, `device` and `precisions` (the default first) are empty where it does not; `reason` then says
    why, and `remedy` what to do about it. `converts`: a graph runs in any of these precisions, whatever its
    weights are stored in.
    """

    name: str
    available: bool
    version: str = ""
    device: str = ""
    precisions: tuple[str, ...] = ()
    converts: bool = False
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class _Entry:
    """Where a driver is: a module, or an object in one; the extra that installs it; what kind it is.

    `compiles`: for all shapes of a graph, on the machine that will run it; `fixes`: for one shape too.
    `built_before`: it runs nothing else. `asked_for`: "auto" never takes it.
    """

    driver: str
    extra: str
    compiles: bool = False
    fixes: bool = False
    built_before: bool = False
    asked_for: bool = False


_SESSIONS = "allaprima.runtime.sessions."
_ENTRIES = {
    "tensorrt": _Entry(_SESSIONS + "tensorrt_driver:TENSORRT", "tensorrt", built_before=True),
    "tensorrt-rtx": _Entry(_SESSIONS + "tensorrt_driver:TENSORRT_RTX", "tensorrt-rtx", built_before=True),
    "ort-cuda": _Entry(_SESSIONS + "ort_cuda:CUDA", "ort-gpu"),
    "openvino": _Entry(_SESSIONS + "openvino", "openvino", compiles=True, fixes=True),
    "ort": _Entry(_SESSIONS + "ort", "ort", compiles=True),
    "ort-tensorrt": _Entry(_SESSIONS + "ort_cuda:TENSORRT", "ort-gpu", asked_for=True),
    "ort-tensorrt-rtx": _Entry(_SESSIONS + "ort_cuda:TENSORRT_RTX", "tensorrt-rtx", asked_for=True),
}
"""In the order in which "auto" tries them: the fastest first."""


def backends() -> tuple[BackendInfo, ...]:
    """All backends; those that are installed are imported to see that they work."""
    return tuple(_probe(name) for name in _ENTRIES)


@dataclass(frozen=True)
class Decision:
    """What "auto" comes to: a backend, and of each faster one why not."""

    backend: str
    passed: tuple[tuple[str, str], ...]


def decide(bundle: Bundle | None = None) -> Decision:
    """The fastest backend that works here and, for those that run only what was built before, has engines.

    Without a bundle there are none. Raises BackendError if no backend works.
    """
    passed = []
    for name, entry in _ENTRIES.items():
        if entry.asked_for:
            continue
        info = _probe(name)
        if not info.available:
            passed.append((name, info.reason))
        elif entry.built_before and not (bundle and _all_built(bundle, name)):
            passed.append((name, f"nothing was built for it: allaprima build --backend {name}"))
        else:
            return Decision(name, tuple(passed))
    remedies = " or ".join(_remedy(name) for name in ("openvino", "ort"))
    raise BackendError(f"no backend works here: {remedies}")


def choose(backend: str = "auto", bundle: Bundle | None = None) -> str:
    """The name of a backend that works here: `backend` itself, or what `decide` says for "auto".

    Raises BackendError for an unknown name, or one that does not work, with what to install.
    """
    if backend == "auto":
        return decide(bundle).backend
    if backend not in _ENTRIES:
        raise BackendError(f"unknown backend '{backend}': choose from auto, {', '.join(_ENTRIES)}")
    info = _probe(backend)
    if not info.available:
        raise BackendError(f"the backend {backend} does not work here ({info.reason}): {info.remedy}")
    return backend


def compiles(backend: str) -> bool:
    """Whether a backend compiles ahead for all shapes of a graph, on the machine that will run it."""
    return _ENTRIES[backend].compiles


def fixes(backend: str) -> bool:
    """Whether a backend that compiles also does so for one shape alone, which may be faster for that."""
    return _ENTRIES[backend].fixes


def open_session(
    graph: Path,
    component: Component,
    backend: str = "auto",
    *,
    precision: str | None = None,
    threads: int | None = None,
    engines: Sequence[EngineFile] = (),
    memory_limit: int | None = None,
) -> Session:
    """Load the graph of a component.

    `precision` None or "auto" is the fastest that the backend has for this graph on this machine; `threads`
    None leaves the number to the backend; `engines` are what the same backend compiled before, loaded in
    place of the graph: of several that serve a shape the first. With a `memory_limit` in bytes nothing is
    loaded before the first `bind`, and engines whose weights can be streamed keep below it.

    Raises BackendError.
    """
    name = choose(backend)
    precision = _known_precision(precision)
    if component.overflows_fp16:
        precision = engine_precision(component, name, precision)
    if threads is not None and threads < 1:
        raise BackendError(f"threads is {threads}: give at least 1, or leave it out")
    return _driver(name).open_session(
        graph,
        component,
        precision=precision,
        threads=threads,
        engines=engines,
        memory_limit=memory_limit,
    )


def footprint(
    graph: Path,
    component: Component,
    backend: str,
    engines: Sequence[EngineFile] = (),
    *,
    precision: str | None = None,
) -> Footprint:
    """The memory that a component takes with a backend once it has run, beside activations: an estimate.

    `precision` is as in `open_session`.
    """
    chosen = engine_precision(component, backend, precision)
    return _driver(backend).footprint(graph, component, engines, precision=chosen)


def compile_engine(
    graph: Path,
    component: Component,
    folder: Path,
    backend: str,
    *,
    precision: str | None = None,
    profile: Profile | None = None,
) -> Path:
    """Compile a graph into `folder`, for all its shapes or for the best of a profile; the engine's main file.

    Raises BackendError.
    """
    name = choose(backend)
    chosen = engine_precision(component, name, precision)
    compiler = cast(Compiler, _driver(name))
    return compiler.compile_engine(graph, component, folder, precision=chosen, profile=profile)


def engine_precision(component: Component, backend: str, precision: str | None) -> str:
    """What a component computes in with a backend that works here; None leaves it to the backend.

    One whose values leave the range of fp16 keeps its own precision where fp16 is asked for; a backend that
    does not have that computes it in fp32.
    """
    info = _probe(backend)
    able = [each for each in info.precisions if info.converts or each in component.precisions]
    chosen = _known_precision(precision) or next(iter(able), component.precision)
    if chosen != "fp16" or not component.overflows_fp16:
        return chosen
    return next((each for each in (component.precision, "fp32") if each in able), component.precision)


def key_of(
    bundle: Bundle,
    component: str,
    backend: str,
    *,
    precision: str | None = None,
    profiles: tuple[Profile, ...] = (),
) -> EngineKey:
    """What identifies the engine of a bundle's component on this machine."""
    name = choose(backend)
    info = _probe(name)
    return engine_key(
        bundle,
        component,
        backend=name,
        backend_version=info.version,
        device=info.device,
        precision=engine_precision(bundle.component(component), name, precision),
        profiles=profiles,
    )


def find_engines(
    bundle: Bundle, component: str, backend: str, *, precision: str | None = None
) -> tuple[EngineFile, ...]:
    """The engines of a component that the cache has for a backend on this machine.

    Those for some shapes come first, of them the newest, and the one for all shapes last.
    """
    key, entry = key_of(bundle, component, backend, precision=precision), _ENTRIES[backend]
    if entry.built_before:
        loader = cast(Loader, _driver(backend))
        return matching_engines(key, lambda other: loader.serves(other.device))
    found = find_engine(key)
    general = () if found is None else (EngineFile(found),)
    if not entry.fixes:
        return general
    fixed = matching_engines(key, lambda other: other.device == key.device and bool(other.profiles))
    return (*fixed, *general)


def _all_built(bundle: Bundle, backend: str) -> bool:
    return all(find_engines(bundle, component, backend) for component in bundle.manifest.components)


def _known_precision(precision: str | None) -> str | None:
    """None for "auto"; BackendError for an unknown one."""
    if precision in (None, "auto"):
        return None
    if precision not in PRECISIONS:
        raise BackendError(f"unknown precision '{precision}': choose from auto, {', '.join(PRECISIONS)}")
    return precision


def _driver(name: str) -> Driver:
    module, _, attribute = _ENTRIES[name].driver.partition(":")
    found = importlib.import_module(module)
    return cast(Driver, getattr(found, attribute) if attribute else found)


def _probe(name: str) -> BackendInfo:
    driver = _driver(name)
    try:
        return BackendInfo(
            name,
            True,
            version=driver.version(),
            device=driver.device(),
            precisions=driver.precisions(),
            converts=driver.converts(),
        )
    except Exception as error:  # a driver package that is present but broken fails in its own ways
        return BackendInfo(name, False, reason=str(error), remedy=_remedy(name))


def _remedy(name: str) -> str:
    return f'pip install "allaprima[{_ENTRIES[name].extra}]"'
