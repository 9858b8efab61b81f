"""Looking after the engine cache."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from allaprima.bundle import VERSION, BackendError, Engine, engines
from allaprima.engine import tensorrt
from allaprima.engine.build import is_being_built
from allaprima.runtime.backends import BackendInfo, backends


@dataclass(frozen=True)
class Entry:
    """One folder of the cache. `stale` says why it will never be loaded here again, "" if it may be."""

    folder: Path
    engine: Engine | None
    size: int
    stale: str


def entries(cache: Path | None = None) -> tuple[Entry, ...]:
    """Everything in the cache, sizes in bytes; builds that were cut short too, but none that still runs."""
    installed = {info.name: info for info in backends()}
    return tuple(
        Entry(folder, engine, _size(folder), _stale(engine, installed))
        for folder, engine in engines(cache)
        if not is_being_built(folder)
    )


def prune(cache: Path | None = None) -> tuple[Entry, ...]:
    """Remove what is stale; what was removed."""
    return _remove(entry for entry in entries(cache) if entry.stale)


def clear(cache: Path | None = None) -> tuple[Entry, ...]:
    """Remove every engine; what was removed. Files in the folder that are not engines stay."""
    return _remove(entries(cache))


def _remove(unwanted: Iterable[Entry]) -> tuple[Entry, ...]:
    """Those that are gone afterwards: others may hold a file open, or own it."""
    tried = tuple(unwanted)
    for entry in tried:
        shutil.rmtree(entry.folder, ignore_errors=True)
    return tuple(entry for entry in tried if not entry.folder.exists())


def _stale(engine: Engine | None, installed: dict[str, BackendInfo]) -> str:
    if engine is None:
        return "unfinished or damaged"
    if engine.key.backend in tensorrt.FLAVOURS:
        return _stale_plan(engine)
    info = installed.get(engine.key.backend)
    if info is None or not info.available:
        return f"the backend {engine.key.backend} is not installed"
    if info.version != engine.key.backend_version:
        return f"built with {info.name} {engine.key.backend_version}, installed is {info.version}"
    if info.device != engine.key.device:
        return f"built for another device: {engine.key.device}"
    return "" if engine.key.allaprima == VERSION else f"built by allaprima {engine.key.allaprima}"


def _stale_plan(engine: Engine) -> str:
    """A plan may be for another machine, so only versions count."""
    backend = engine.key.backend
    try:
        version = tensorrt.version(backend)
    except BackendError:
        return f"the backend {backend} is not installed"
    if version != engine.key.backend_version:
        return f"built with {backend} {engine.key.backend_version}, installed is {version}"
    return "" if engine.key.allaprima == VERSION else f"built by allaprima {engine.key.allaprima}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
