"""Compiled engines on disk: what identifies one, where it lies, and when it may be loaded.

An engine is a folder `<cache>/<backend>-<component>-<digest>` with its files and `engine.json`, which is
written last and says everything in words. It appears by a rename, so what a killed build leaves is never
taken for one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from allaprima.bundle.errors import BuildError, BundleError
from allaprima.bundle.manifest import FileEntry
from allaprima.bundle.profiles import Profile
from allaprima.bundle.record import Record
from allaprima.bundle.store import Bundle, hash_file
from allaprima.bundle.version import VERSION

SIDECAR = "engine.json"
STREAMING = "weight_streaming"
"""The builder's option that lets weights be streamed, among the flags of an engine's key."""
_PARTIAL = ".partial"
_OURS = re.compile(r"\.?[\w-]+-[0-9a-f]{24}(\.\w+\.partial)?", re.ASCII)
"""Names of engines' folders, finished or not. The cache may be a folder in which other things live too."""


ENGINE_VERSION = f"{VERSION}.2"
"""Allaprima's version, and a number that is raised when engines are made in another way than before: those
of a cache are then made anew."""


@dataclass(frozen=True)
class EngineKey(Record):
    """Everything that can change an engine. Two engines with the same key are interchangeable.

    `graph` holds the sha256 of every file of the component, `device` names the processor in the backend's own
    words, `profiles` are the shapes it serves (none: all of the graph's), `flags` the builder's options.
    """

    component: str
    graph: Mapping[str, str]
    backend: str
    backend_version: str
    device: str
    precision: str
    profiles: tuple[Profile, ...]
    flags: Mapping[str, str]
    allaprima: str

    @property
    def folder(self) -> str:
        """Name of the engine's folder in the cache; a plain one, whatever a manifest calls its components."""
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
        return re.sub(r"[^\w-]", "_", f"{self.backend}-{self.component}-{digest[:24]}", flags=re.ASCII)


@dataclass(frozen=True)
class Engine(Record):
    """The sidecar of an engine.

    `error` is the root mean square difference of its outputs from the same graph in float32, over the
    standard deviation of the latter, measured on random inputs when it was built; None if it was built for
    a device that is not here.
    """

    key: EngineKey
    bundle: str
    main: str
    files: Mapping[str, FileEntry]
    build_seconds: float
    error: float | None

    @property
    def size(self) -> int:
        """Bytes on disk, without the sidecar."""
        return sum(entry.size for entry in self.files.values())


@dataclass(frozen=True)
class EngineFile:
    """What a session loads: an engine's main file, and the shapes it serves (none: all of the graph's).

    `streams`: its weights need not all be on the device.
    """

    path: Path
    profiles: tuple[Profile, ...] = ()
    streams: bool = False


def cache_folder() -> Path:
    """Where engines are kept: $ALLAPRIMA_CACHE, else `allaprima/engines` in the user's cache folder."""
    if chosen := os.environ.get("ALLAPRIMA_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "allaprima" / "engines"


def engine_key(
    bundle: Bundle,
    component: str,
    *,
    backend: str,
    backend_version: str,
    device: str,
    precision: str,
    profiles: tuple[Profile, ...] = (),
    flags: Mapping[str, str] | None = None,
) -> EngineKey:
    """The key of one component's engine for one backend on one device."""
    graph = bundle.component(component).graph
    inside = "".join(graph.rpartition("/")[:2])
    files = {path: entry.sha256 for path, entry in bundle.manifest.files.items() if path.startswith(inside)}
    return EngineKey(
        component, files, backend, backend_version, device, precision, profiles, flags or {}, ENGINE_VERSION
    )


def find_engine(key: EngineKey, cache: Path | None = None) -> Path | None:
    """The main file of the engine with this key, or None if there is none that is whole.

    Sizes and hashes of all its files are checked: an engine is code.
    """
    folder = (cache or cache_folder()) / key.folder
    try:
        engine = read_engine(folder)
        if _damage(folder, engine, key):
            return None
    except (BundleError, OSError):
        return None
    return folder / engine.main


def matching_engines(
    key: EngineKey, wanted: Callable[[EngineKey], bool], cache: Path | None = None
) -> tuple[EngineFile, ...]:
    """All whole engines that differ from `key` in profiles and flags at most, newest first.

    Their device need not be the key's: `wanted` says whether an engine with another device or profiles will
    do. Only what is wanted is hashed, which takes a second or two for each gigabyte.
    """
    found = []
    for folder, engine in engines(cache):
        if engine is None or not wanted(engine.key):
            continue
        same = replace(key, profiles=engine.key.profiles, flags=engine.key.flags, device=engine.key.device)
        if same == engine.key and find_engine(engine.key, cache):
            streams = STREAMING in engine.key.flags
            file = EngineFile(folder / engine.main, engine.key.profiles, streams)
            found.append(((folder / SIDECAR).stat().st_mtime, file))
    return tuple(file for _, file in sorted(found, key=lambda pair: -pair[0]))


def why_missing(key: EngineKey, cache: Path | None = None) -> str:
    """Why `find_engine` finds none: what is damaged, or in what the nearest other engine differs.

    "" if nothing like it was ever built, or it is there.
    """
    folder = (cache or cache_folder()) / key.folder
    if folder.exists():
        try:
            return _damage(folder, read_engine(folder), key)
        except (BundleError, OSError) as cause:
            return str(cause)
    differences = []
    for _, engine in engines(cache):
        if engine is None or (engine.key.component, engine.key.backend) != (key.component, key.backend):
            continue
        old, new = engine.key.to_json(), key.to_json()
        differences.append([name for name in old if old[name] != new[name]])
        if len(differences[-1]) == 1 and (name := differences[-1][0]) in _TOLD:
            return f"{_TOLD[name]} was {old[name]}, is {new[name]}"
    nearest = min(differences, key=len, default=[])
    return f"another {' and '.join(_TOLD.get(name, name) for name in nearest)}" if nearest else ""


_TOLD = {
    "backend_version": "the backend's version",
    "device": "the device",
    "precision": "precision",
    "allaprima": "allaprima's version",
}
"""Parts of a key that are short enough to be told."""


def _damage(folder: Path, engine: Engine, key: EngineKey) -> str:
    """What is wrong with an engine's folder; OSError if a file is missing."""
    if engine.key != key:
        return f"{folder / SIDECAR} describes another engine"
    for name, entry in engine.files.items():
        size = (folder / name).stat().st_size
        if size != entry.size:
            return f"{folder / name} has {size} bytes, should have {entry.size}"
        if hash_file(folder / name) != entry.sha256:
            return f"{folder / name} is not what was built: its sha256 is another"
    return ""


def read_engine(folder: Path) -> Engine:
    """The sidecar of an engine's folder; BundleError if there is none or it cannot be read."""
    try:
        engine = Engine.from_json(json.loads((folder / SIDECAR).read_text(encoding="utf-8")))
    except (OSError, ValueError) as cause:
        raise BundleError(f"{folder} is not a finished engine: {cause}") from cause
    if engine.main not in engine.files or any(Path(name).name != name for name in engine.files):
        raise BundleError(
            f"{folder} is not a finished engine: its files are not plain names beside {SIDECAR}"
        )
    return engine


def engines(cache: Path | None = None) -> Iterator[tuple[Path, Engine | None]]:
    """Every engine's folder with its sidecar, None where it is unfinished or damaged; ordered by name."""
    root = cache or cache_folder()
    for folder in sorted(root.iterdir() if root.is_dir() else ()):
        if not (_OURS.fullmatch(folder.name) and folder.is_dir()):
            continue
        try:
            yield folder, read_engine(folder)
        except BundleError:
            yield folder, None


@contextmanager
def writing_engine(key: EngineKey, cache: Path | None = None) -> Iterator[Path]:
    """A private folder to build in; `seal_engine` makes it an engine, leaving without that removes it.

    Raises BuildError if the cache cannot be written.
    """
    root = cache or cache_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(_PARTIAL, f".{key.folder}.", root))
    except OSError as cause:
        raise BuildError(
            f"the engine cache {root} cannot be written ({cause.strerror}): "
            "set ALLAPRIMA_CACHE to another folder"
        ) from cause
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def seal_engine(
    folder: Path, key: EngineKey, *, bundle: str, main: str, seconds: float, error: float | None
) -> Engine:
    """Hash what lies in `folder`, write the sidecar, and move it to its place in the cache.

    If another process has built the same engine meanwhile, that one stays and is returned.

    Raises BuildError if the disk refuses.
    """
    target = folder.with_name(key.folder)
    try:
        files = {
            path.name: FileEntry(path.stat().st_size, hash_file(path)) for path in sorted(folder.iterdir())
        }
        engine = Engine(key, bundle, main, files, seconds, error)
        (folder / SIDECAR).write_text(json.dumps(engine.to_json(), indent=2) + "\n", encoding="utf-8")
        for path in folder.iterdir():
            path.chmod(0o600)
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if find_engine(key, target.parent) is None:
            shutil.rmtree(target, ignore_errors=True)
            _move(folder, target, key)
        return read_engine(target)
    except (BundleError, OSError) as cause:
        raise BuildError(f"the engine {target} cannot be written: {cause}") from cause


def _move(folder: Path, target: Path, key: EngineKey) -> None:
    try:
        folder.rename(target)
    except OSError:  # somebody else's engine may be there since a moment ago
        if find_engine(key, target.parent) is None:
            raise
