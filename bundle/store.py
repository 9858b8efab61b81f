"""Bundles on disk: open and check one, write one atomically, find one by name."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from allaprima.bundle.errors import BundleError
from allaprima.bundle.manifest import Component, FileEntry, Manifest, check_relative

MANIFEST = "bundle.json"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its checked manifest."""

    folder: Path
    manifest: Manifest

    def path(self, relative: str) -> Path:
        """Where a file of the bundle lies; BundleError if `relative` would leave the folder."""
        try:
            return self.folder / check_relative(relative)
        except ValueError as error:
            raise BundleError(f"{self.folder}: {error}") from error

    def component(self, name: str) -> Component:
        """The component of that name; BundleError listing the names there are."""
        try:
            return self.manifest.components[name]
        except KeyError:
            names = ", ".join(self.manifest.components)
            raise BundleError(f"{self.folder} has no component '{name}': it has {names}") from None


def open_bundle(folder: str | Path, *, verify: bool = False) -> Bundle:
    """Open a bundle and check it: the manifest, the size of every file, and with `verify` every sha256.

    Raises BundleError, saying what is wrong and where.
    """
    if not str(folder).strip():
        raise BundleError("the path of the bundle is empty: give a folder or the name of a built-in bundle")
    root = Path(folder)
    manifest = _read_manifest(root)
    for relative in manifest.required():
        if relative not in manifest.files:
            raise BundleError(f"{root / MANIFEST}: '{relative}' is used but not listed in 'files'")
    for relative, entry in manifest.files.items():
        _check_file(root / relative, entry, verify)
    return Bundle(root, manifest)


def is_bundle(folder: Path) -> bool:
    """Whether the folder claims to be a bundle."""
    return (folder / MANIFEST).is_file()


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    if not root.exists():
        raise BundleError(f"{root}: no such folder")
    if not root.is_dir():
        raise BundleError(f"{root} is a file, not the folder of a bundle")
    if not path.is_file():
        raise BundleError(f"{root} is not a bundle: it has no {MANIFEST}. Make one with: allaprima export")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON ({error}): export the bundle again") from error
    try:
        return Manifest.from_json(value)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error


def _check_file(path: Path, entry: FileEntry, verify: bool) -> None:
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    if size is None:
        raise BundleError(f"{path} is missing: copy or export the bundle again")
    if size != entry.size:
        what = "truncated" if size < entry.size else "too long"
        raise BundleError(
            f"{path} is {what}: {size} bytes, should be {entry.size}. Copy or export the bundle again"
        )
    if verify and hash_file(path) != entry.sha256:
        raise BundleError(
            f"{path} is corrupt: its sha256 is not the one in {MANIFEST}. Copy or export the bundle again"
        )


def hash_file(path: Path) -> str:
    """Lower-case hexadecimal sha256 of a file; BundleError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error


class BundleWriter:
    """Writes a bundle so that `target` either holds all of it or is as it was.

    ```
    with BundleWriter(target) as writer:
        ...                                  # write files under writer.folder
        bundle = writer.commit(manifest)     # hashes them, writes bundle.json, renames the folder to target
    ```

    Leaving the block without a commit, by an exception or not, removes everything that was written. An
    existing target is BundleError unless `overwrite`, and even then only a bundle or an empty folder is
    replaced.
    """

    def __init__(self, target: str | Path, *, overwrite: bool = False) -> None:
        if not str(target).strip():
            raise BundleError("the path of the new bundle is empty: name a folder")
        self._target = Path(target).expanduser().resolve()
        self._overwrite = overwrite
        self._made: list[Path] = []
        self.folder = self._sibling("partial")

    def __enter__(self) -> Self:
        self._check_target()
        try:
            self._make_parents()
            self.folder.mkdir()
        except OSError as error:
            self._discard()
            raise BundleError(f"{self._target} cannot be written: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def commit(self, manifest: Manifest) -> Bundle:
        """Seal the folder and move it to the target; `manifest.files` is replaced by what is there.

        Raises BundleError if a file that the manifest refers to was not written, or the disk refuses.
        """
        try:
            manifest = _with_files(manifest, self._list_files())
            for relative in manifest.required():
                if relative not in manifest.files:
                    raise BundleError(f"'{relative}' is in the manifest but was not written")
            _write_synced(self.folder / MANIFEST, _dump(manifest.to_json()))
            self._check_target()
            self._swap()
        except OSError as error:
            raise BundleError(f"{self._target} cannot be written: {error.strerror}") from error
        self._made.clear()
        return Bundle(self._target, manifest)

    def _list_files(self) -> dict[str, FileEntry]:
        files = {}
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            with path.open("rb+") as file:  # "+" because fsync wants a writable file on some systems
                os.fsync(file.fileno())
            files[path.relative_to(self.folder).as_posix()] = FileEntry(path.stat().st_size, hash_file(path))
        return files

    def _swap(self) -> None:
        """Rename the finished folder to the target; what was there steps aside, and comes back on failure."""
        if not self._target.exists():
            self.folder.rename(self._target)
            return
        old = self._sibling("old")
        self._target.rename(old)
        try:
            self.folder.rename(self._target)
        except OSError:
            old.rename(self._target)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _check_target(self) -> None:
        if not self._target.exists():
            return
        if not self._target.is_dir():
            raise BundleError(f"{self._target} is a file: name a folder for the bundle")
        empty = not any(self._target.iterdir())
        if not (empty or is_bundle(self._target)):
            raise BundleError(f"{self._target} exists and is not a bundle: name another folder")
        if not self._overwrite:
            raise BundleError(
                f"{self._target} exists already: name another folder, or overwrite it (--force)"
            )

    def _make_parents(self) -> None:
        missing = [folder for folder in self._target.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir()
            self._made.append(folder)

    def _discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in reversed(self._made):
            with suppress(OSError):  # somebody else may have put something there meanwhile
                folder.rmdir()

    def _sibling(self, suffix: str) -> Path:
        return self._target.with_name(f".{self._target.name}.{os.getpid()}.{suffix}")


def _with_files(manifest: Manifest, files: dict[str, FileEntry]) -> Manifest:
    try:
        return replace(manifest, files=files)
    except ValueError as error:
        raise BundleError(str(error)) from error


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def builtin_names() -> tuple[str, ...]:
    """Names of the bundles that come with the package, sorted."""
    return tuple(sorted(_builtin()))


def builtin_bundle(name: str) -> Path:
    """The folder of a bundle that comes with the package; BundleError listing the names there are."""
    try:
        return _builtin()[name]
    except KeyError:
        raise _unknown(name, "there is no built-in bundle of that name") from None


def resolve(name_or_path: str) -> Path:
    """The folder that a user means: a bundle's folder, or else the name of a built-in bundle.

    A folder that is a bundle wins over a built-in name; any other folder does not. What is returned may still
    be something else than a bundle: `open_bundle` says so.
    """
    if not name_or_path.strip():
        raise BundleError("the path of the bundle is empty: give a folder or the name of a built-in bundle")
    path = Path(name_or_path).expanduser()
    if is_bundle(path):
        return path
    if name_or_path in _builtin():
        return builtin_bundle(name_or_path)
    if not path.exists():
        raise _unknown(name_or_path, "no such folder, and no built-in bundle of that name")
    return path


def _builtin() -> dict[str, Path]:
    # The bundles are data of allaprima.runtime. It is found by name and not imported: this layer needs
    # nothing but the standard library.
    spec = importlib.util.find_spec("allaprima.runtime")
    places = spec.submodule_search_locations if spec else None
    folders = (folder for place in places or () for folder in Path(place, "bundles").glob("*"))
    return {folder.name: folder for folder in folders if is_bundle(folder)}


def _unknown(name: str, why: str) -> BundleError:
    known = ", ".join(builtin_names()) or "none in this installation"
    return BundleError(f"{name}: {why} (built-in bundles: {known})")
