"""TensorRT's timing caches: how fast each kernel was on a GPU, kept so that the next build is quicker.

One file per version of TensorRT and device beside the engines, `tensorrt-<version>-<device>.timing`.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

_NAME = re.compile(r"tensorrt-(\d+(?:\.\w+)+)-[\w-]+\.timing", re.ASCII)


def timing_name(version: str, device: str) -> str:
    """Name of the file: both count, since timings hold for exactly one version and kind of GPU."""
    return f"tensorrt-{version}-{re.sub(r'[^0-9A-Za-z]+', '-', device).strip('-')}.timing"


@contextmanager
def timing_cache(folder: Path, cache: Path, version: str, device: str) -> Iterator[Path]:
    """A private copy to build with, which need not exist; what is there afterwards becomes the timing cache.

    Only one process at a time gets it: of two builds on one GPU, each would spoil the timings of the other.

    Args:
        folder: where the copy may lie meanwhile.
        cache: where the timing caches are.
        version: of TensorRT.
        device: what is timed.
    """
    shared = cache / timing_name(version, device)
    lock = FileLock(cache / f".{shared.name}.lock", mode=0o600)
    with lock, tempfile.TemporaryDirectory(dir=folder) as private:
        copy = Path(private) / shared.name
        if shared.is_file():
            shutil.copyfile(shared, copy)
        try:
            yield copy
            if copy.is_file():
                copy.chmod(0o600)
                os.replace(copy, shared)
        finally:
            with suppress(OSError):
                os.unlink(lock.lock_file)


def timing_caches(cache: Path) -> Iterator[tuple[Path, str]]:
    """Every timing cache with the version of TensorRT that it is for; ordered by name."""
    for path in sorted(cache.iterdir() if cache.is_dir() else ()):
        if (match := _NAME.fullmatch(path.name)) and path.is_file():
            yield path, match[1]
