"""TensorRT and TensorRT-RTX: two modules with one API. What differs between them is here."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allaprima.bundle import BackendError


@dataclass(frozen=True)
class Flavour:
    """One of the two.

    `module` is its Python module, `bindings` the same without the front end, `libraries` the package that
    brings the shared libraries where the bindings do not find them, `remedy` what to install.
    `ahead_of_time`: it compiles without a GPU, for compute capabilities; kernels are chosen when the plan is
    loaded. The other kind times its kernels on the GPU that it compiles for. `refits_since` is the first
    version whose refittable plans can be trusted.
    """

    module: str
    bindings: str
    libraries: str
    remedy: str
    ahead_of_time: bool
    refits_since: tuple[int, int]


FLAVOURS = {
    "tensorrt": Flavour(
        "tensorrt",
        "tensorrt_bindings",
        libraries="",
        remedy='pip install "allaprima[tensorrt]" on a machine with an NVIDIA GPU',
        ahead_of_time=False,
        refits_since=(11, 4),
    ),
    "tensorrt-rtx": Flavour(
        "tensorrt_rtx",
        "tensorrt_rtx_bindings",
        libraries="onnxruntime_ep_nv_tensorrt_rtx",
        remedy='pip install "allaprima[tensorrt-rtx]"',
        ahead_of_time=True,
        refits_since=(1, 0),
    ),
}


def flavour_for(capability: str) -> str | None:
    """Which of the two runs on a GPU of this compute capability ("8.9"); None for those before Turing.

    TensorRT-RTX is made for graphics cards: 7.5, 8.x and 12.x. Hopper (9.0) and data-centre Blackwell (10.x)
    need TensorRT, which runs on the others too.
    """
    major, minor = map(int, capability.split("."))
    if (major, minor) < (7, 5):
        return None
    return "tensorrt-rtx" if major in (7, 8, 12) else "tensorrt"


def load(backend: str) -> Any:
    """The Python module of a flavour; `TensorrtModule` says what a session may use of it.

    Raises BackendError saying what to install.
    """
    flavour = FLAVOURS[backend]
    with contextlib.suppress(ImportError):
        return importlib.import_module(flavour.module)
    try:
        if flavour.libraries:
            _load_libraries(flavour.libraries)
        module = importlib.import_module(flavour.bindings)
    except (ImportError, OSError) as cause:
        raise BackendError(f"{backend} is not installed ({cause}): {flavour.remedy}") from cause
    # By this name others import it, Polygraphy among them.
    return sys.modules.setdefault(flavour.module, module)


def version(backend: str) -> str:
    """The version of a flavour; BackendError if it is not installed."""
    return str(load(backend).__version__)


def _load_libraries(package: str) -> None:
    """The wheels on PyPI are the bindings alone; their libraries come with ONNX Runtime's plug-in."""
    found = importlib.util.find_spec(package)
    folder = Path(found.origin).parent if found is not None and found.origin else None
    for stem in ("libcudart.so.", "libtensorrt_rtx.so.", "libtensorrt_onnxparser_rtx.so."):
        paths = sorted(folder.glob(f"{stem}*")) if folder is not None else []
        if paths:
            ctypes.CDLL(str(paths[-1]), mode=ctypes.RTLD_GLOBAL)
