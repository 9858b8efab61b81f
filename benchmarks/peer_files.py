"""Models in the layout of a peer, made once of a checkpoint and kept beside the engines."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from allaprima.benchmarks.bundles import Model
from allaprima.benchmarks.contestants import Field
from allaprima.benchmarks.plan import Work
from allaprima.benchmarks.process import in_new_process
from allaprima.bundle import BackendError, RequestError, cache_folder

FAMILIES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""The pipelines that every peer knows."""
INDEX = "model_index.json"

CODE = ("compatible.py", "openvino_models.py", "peer_program.py", "plain_graphs.py")
"""What the files are made by."""


class Shapes:
    """What shape a contestant is compiled for: one of the plan's while each has its time.

    Any, once another was asked for, or one again that it had left: they then come in any order, and to
    compile for each of them would be most of what it does.
    """

    def __init__(self, works: Sequence[Work]) -> None:
        self.fixed: tuple[int, int, int] | None = works[0].shape
        self._coming = {work.shape for work in works} - {self.fixed}

    def changed(self, work: Work) -> bool:
        """Whether it must be compiled anew for this work; `fixed` then says for what, None for any shape."""
        if self.fixed is None or work.shape == self.fixed:
            return False
        self.fixed = work.shape if work.shape in self._coming else None
        self._coming.discard(work.shape)
        return True


def require_packages(peer: str, modules: Sequence[str], remedy: str) -> None:
    """Raises BackendError with the remedy if a module is not installed; nothing is imported."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(f"{peer} needs {', '.join(missing)}, which is not installed: {remedy}")


def require_folder(peer: str, field: Field) -> Path:
    """The checkpoint of the field, of any pipeline of diffusers. Raises RequestError where there is none."""
    if field.checkpoint is None:
        raise RequestError(f"{peer} reads a checkpoint: give --checkpoint DIR, the one of the bundle")
    if not (field.checkpoint / INDEX).is_file():
        raise RequestError(f"{field.checkpoint} is no diffusers folder: it has no {INDEX}")
    return field.checkpoint


def require_checkpoint(peer: str, field: Field) -> Path:
    """As `require_folder`, and RequestError if it is of a pipeline that not every peer knows."""
    checkpoint = require_folder(peer, field)
    kind = json.loads((checkpoint / INDEX).read_text(encoding="utf-8")).get("_class_name")
    if kind not in FAMILIES:
        raise RequestError(f"{checkpoint} is a {kind}: {peer} is compared on {', '.join(FAMILIES)}")
    return checkpoint


def prepared(
    kind: str, checkpoint: Path, versions: Mapping[str, str], make: Callable[[Path, Path], None]
) -> Path:
    """The folder that `make(checkpoint, folder)` fills, in a process of its own if it is not there yet.

    Another checkpoint, or other `versions` of what makes it, is another folder. Raises what `make` raises.
    """
    root = cache_folder() / "peers"
    folder = root / f"{kind}-{Model(checkpoint.resolve(), root).name}-{_key(checkpoint, versions)}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(".partial", f".{kind}-", root))
    try:
        in_new_process(make, checkpoint, partial)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def stamp_of(folder: Path) -> str:
    """What changes with any file of a folder: a digest of their places, sizes and times."""
    files = sorted(path for path in folder.resolve().rglob("*") if path.is_file())
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def _key(checkpoint: Path, versions: Mapping[str, str]) -> str:
    code = b"".join((Path(__file__).parent / name).read_bytes() for name in CODE)
    about = repr((stamp_of(checkpoint), sorted(versions.items())))
    return hashlib.sha256(about.encode() + code).hexdigest()[:12]
