"""Looking after the engine cache."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from allaprima.bundle import ENGINE_VERSION, BackendError, Engine, cache_folder, engines
from allaprima.engine.build import is_being_built
from allaprima.engine.timing import timing_caches
from allaprima.runtime.backends import BackendInfo, backends
from allaprima.runtime.flavours import FLAVOURS, version


@dataclass(frozen=True)
class Entry:
    """One engine's folder in the cache, or one timing cache, which is a file and has no engine.

    `stale` says why it will never be loaded here again, "" if it may be.
    """

    path: Path
    engine: Engine | None
    size: int
    stale: str


def entries(cache: Path | None = None) -> tuple[Entry, ...]:
    """Everything in the cache, sizes in bytes; builds that were cut short too, but none that still runs."""
    installed = {info.name: info for info in backends()}
    found = [
        Entry(folder, engine, _size(folder), _stale(engine, installed))
        for folder, engine in engines(cache)
        if not is_being_built(folder)
    ]
    for path, made in timing_caches(cache or cache_folder()):
        found.append(Entry(path, None, path.stat().st_size, _stale_version("tensorrt", made)))
    return tuple(found)


def prune(cache: Path | None = None) -> tuple[Entry, ...]:
    """Remove what is stale; what was removed."""
    return _remove(entry for entry in entries(cache) if entry.stale)


def clear(cache: Path | None = None) -> tuple[Entry, ...]:
    """Remove every engine and timing cache; what was removed. Other things in the folder stay."""
    return _remove(entries(cache))


def _remove(unwanted: Iterable[Entry]) -> tuple[Entry, ...]:
    """Those that are gone afterwards: others may hold a file open, or own it."""
    tried = tuple(unwanted)
    for entry in tried:
        if entry.path.is_dir():
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            with suppress(OSError):
                entry.path.unlink()
    return tuple(entry for entry in tried if not entry.path.exists())


def _stale(engine: Engine | None, installed: dict[str, BackendInfo]) -> str:
    if engine is None:
        return "unfinished or damaged"
    if engine.key.backend in FLAVOURS:  # a plan may be for another machine, so only versions count
        return _stale_version(engine.key.backend, engine.key.backend_version) or _stale_allaprima(engine)
    info = installed.get(engine.key.backend)
    if info is None or not info.available:
        return f"the backend {engine.key.backend} is not installed"
    if info.version != engine.key.backend_version:
        return f"built with {info.name} {engine.key.backend_version}, installed is {info.version}"
    if info.device != engine.key.device:
        return f"built for another device: {engine.key.device}"
    return _stale_allaprima(engine)


def _stale_version(backend: str, made: str) -> str:
    """Why what was made with a version of TensorRT or TensorRT-RTX is of no use."""
    try:
        found = version(backend)
    except BackendError:
        return f"the backend {backend} is not installed"
    return "" if found == made else f"built with {backend} {made}, installed is {found}"


def _stale_allaprima(engine: Engine) -> str:
    return "" if engine.key.allaprima == ENGINE_VERSION else f"built by allaprima {engine.key.allaprima}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
