"""TensorRT and TensorRT-RTX: from an ONNX graph to a plan, through Polygraphy.

The two share their API; what differs is in `FLAVOURS` and in `_config`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from allaprima.bundle import BackendError, BuildError, Component, Profile, RequestError

TARGETS = {"7.5": 0x01, "8.0": 0x02, "8.6": 0x04, "8.9": 0x08, "12.0": 0x10, "12.1": 0x20}
"""Compute capabilities that TensorRT-RTX compiles for, with their bits in a plan's header."""
AMPERE_AND_NEWER = ("8.0", "8.6", "8.9", "12.0", "12.1")
_TARGET_BYTE = 32
"""Place of those bits in the header."""


@dataclass(frozen=True)
class Flavour:
    """One of the two: Python module, its bindings, and what to install."""

    module: str
    bindings: str
    remedy: str


FLAVOURS = {
    "tensorrt": Flavour(
        "tensorrt", "tensorrt_bindings", 'pip install "allaprima[tensorrt]" (needs an NVIDIA GPU)'
    ),
    "tensorrt-rtx": Flavour("tensorrt_rtx", "tensorrt_rtx_bindings", 'pip install "allaprima[tensorrt-rtx]"'),
}


@dataclass(frozen=True)
class Options:
    """How a plan is built. `workspace` in bytes and `level` (0 to 5) None are the builder's defaults."""

    targets: tuple[str, ...] = ()
    workspace: int | None = None
    level: int | None = None

    def __post_init__(self) -> None:
        for target in self.targets:
            if target not in TARGETS:
                raise RequestError(
                    f"TensorRT-RTX does not compile for compute capability {target}: "
                    f"choose from {', '.join(TARGETS)}"
                )
        if self.level is not None and not 0 <= self.level <= 5:
            raise RequestError(f"optimisation level {self.level}: choose 0 to 5")
        if self.workspace is not None and self.workspace < 1:
            raise RequestError(f"a workspace of {self.workspace} bytes: give at least 1")

    def for_targets(self, targets: tuple[str, ...]) -> Options:
        """The same for these compute capabilities."""
        return replace(self, targets=targets)

    def flags(self) -> dict[str, str]:
        """What of this changes a plan, in words, for the engine's key."""
        named = {"workspace": self.workspace, "level": self.level}
        return {name: str(value) for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class CompilerInfo:
    """Whether a flavour can compile here: its version, or the reason why not and what to install."""

    name: str
    available: bool
    version: str = ""
    reason: str = ""


def compilers() -> tuple[CompilerInfo, ...]:
    """The flavours that this version of allaprima compiles for."""
    try:
        return (CompilerInfo("tensorrt-rtx", True, version("tensorrt-rtx")),)
    except BackendError as cause:
        return (CompilerInfo("tensorrt-rtx", False, reason=str(cause)),)


def load(backend: str) -> Any:
    """The Python module of a flavour. Raises BackendError saying what to install."""
    flavour = FLAVOURS[backend]
    with contextlib.suppress(ImportError):
        return importlib.import_module(flavour.module)
    try:
        if backend == "tensorrt-rtx":
            _load_libraries()
        module = importlib.import_module(flavour.bindings)
    except (ImportError, OSError) as cause:
        raise BackendError(f"{backend} is not installed ({cause}): {flavour.remedy}") from cause
    return sys.modules.setdefault(flavour.module, module)  # by this name Polygraphy imports it


def _load_libraries() -> None:
    """The wheels on PyPI are the bindings alone; their libraries come with ONNX Runtime's plug-in."""
    import ctypes

    found = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    folder = Path(found.origin).parent if found is not None and found.origin else None
    for stem in ("libcudart.so.", "libtensorrt_rtx.so.", "libtensorrt_onnxparser_rtx.so."):
        paths = sorted(folder.glob(f"{stem}*")) if folder is not None else []
        if paths:
            ctypes.CDLL(str(paths[-1]), mode=ctypes.RTLD_GLOBAL)


def version(backend: str) -> str:
    """The version of a flavour; BackendError if it is not installed."""
    return str(load(backend).__version__)


def build_plan(
    graph: Path,
    component: Component,
    profiles: Sequence[Profile],
    backend: str,
    options: Options,
    enter: Callable[[str], None],
) -> bytes:
    """Compile one graph, strongly typed as it was exported.

    Attention is marked decomposable: a fused kernel is used where there is one, instead of failing where
    there is none. `enter` is told "parse" and "build".

    Raises:
        BackendError: the flavour is not installed.
        BuildError: the parser or the builder refuses, with its own words.
    """
    load(backend)
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if backend == "tensorrt-rtx" else "0"
    try:
        from polygraphy.backend import trt as polygraphy
    except ImportError as cause:
        raise BackendError(f"polygraphy is not installed: {FLAVOURS[backend].remedy}") from cause
    enter("parse")
    with _words(f"{graph.parent.name}: {backend}") as ask:
        network = ask(polygraphy.SetDecomposableAttentions(polygraphy.NetworkFromOnnxPath(str(graph))))
        _check_network(network[1], component)
        enter("build")
        config = _config(polygraphy, backend, component, profiles, options)
        plan = bytes(ask(polygraphy.EngineBytesFromNetwork(network, config)))
    if backend == "tensorrt-rtx":
        _check_targets(plan, options.targets)
    return plan


def _config(
    polygraphy: Any, backend: str, component: Component, profiles: Sequence[Profile], options: Options
) -> Any:
    import importlib

    shapes = []
    for profile in profiles:
        one = polygraphy.Profile()
        for spec in component.inputs:
            one.add(spec.name, *profile.shapes(spec))
        shapes.append(one)
    chosen: dict[str, Any] = {"profiles": shapes}
    if options.level is not None:
        chosen["builder_optimization_level"] = options.level
    if options.workspace is not None:
        pool = load(backend).MemoryPoolType.WORKSPACE
        chosen["memory_pool_limits"] = {pool: options.workspace}
    if backend == "tensorrt":
        return polygraphy.CreateConfig(**chosen)
    rtx = importlib.import_module("polygraphy.backend.tensorrt_rtx")
    targets = [tuple(map(int, target.split("."))) for target in options.targets]
    return rtx.CreateConfigRTX(compute_capabilities=targets, **chosen)


def _check_network(network: Any, component: Component) -> None:
    """The parsed network must have the tensors of the manifest."""
    for specs, count, get in (
        (component.inputs, network.num_inputs, network.get_input),
        (component.outputs, network.num_outputs, network.get_output),
    ):
        wanted = {spec.name: len(spec.shape) for spec in specs}
        found = {get(index).name: len(get(index).shape) for index in range(count)}
        if wanted != found:
            raise BuildError(
                f"{component.graph}: graph and manifest disagree, tensors and ranks are {found}, should "
                f"be {wanted}. Export the bundle again"
            )


def _check_targets(plan: bytes, targets: Sequence[str]) -> None:
    wanted = sum(TARGETS[target] for target in targets)
    found = plan[_TARGET_BYTE] if len(plan) > _TARGET_BYTE else 0
    if found & wanted != wanted:
        raise BuildError(f"the plan is for targets {found:#04x}, not for {', '.join(targets)}")


@contextlib.contextmanager
def _words(what: str) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Runs Polygraphy's loaders silently, and turns what they log into the message of a BuildError."""
    said = io.StringIO()

    def ask(loader: Callable[[], Any]) -> Any:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            # Polygraphy sets a timing cache, which TensorRT-RTX calls deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            return loader()

    try:
        yield ask
    except BuildError:
        raise
    except Exception as cause:
        raise BuildError(f"{what} cannot compile it: {_errors(said.getvalue()) or cause}") from cause


def _errors(log: str) -> str:
    """The first of the errors in Polygraphy's log, without its colours and prefixes."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log)
    lines = [line[4:].strip() for line in plain.splitlines() if line.startswith(("[E] ", "[!] "))]
    return "; ".join(lines[:2])
