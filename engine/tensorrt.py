"""TensorRT and TensorRT-RTX: from an ONNX graph to a plan, through Polygraphy.

The two share their API; what differs is in `runtime/flavours.py` and in `_config`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from allaprima.bundle import BackendError, BuildError, Component, Profile, TensorSpec, component_name
from allaprima.engine.options import TARGETS, Options
from allaprima.runtime.cuda import current_device
from allaprima.runtime.flavours import FLAVOURS, load, version

# Classes of the two modules, which come without types. A test holds what is used of values of these classes
# against the real ones, so annotate every such value.
INetworkDefinition: TypeAlias = Any
ITensor: TypeAlias = Any

_TARGET_BYTE = 32
"""Place of the bits of `TARGETS` in a plan's header."""
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""NumPy's names for the parser's."""


@dataclass(frozen=True)
class CompilerInfo:
    """Whether a flavour can compile here: its version, or the reason why not and what to install."""

    name: str
    available: bool
    version: str = ""
    reason: str = ""


def compilers() -> tuple[CompilerInfo, ...]:
    """TensorRT-RTX and TensorRT."""
    return tuple(_probe(name) for name in sorted(FLAVOURS, key=lambda name: not FLAVOURS[name].ahead_of_time))


def _probe(backend: str) -> CompilerInfo:
    try:
        found = version(backend)
        if not FLAVOURS[backend].ahead_of_time:
            current_device()
        return CompilerInfo(backend, True, found)
    except BackendError as cause:
        return CompilerInfo(backend, False, reason=str(cause))


def build_plan(
    graph: Path,
    component: Component,
    profiles: Sequence[Profile],
    backend: str,
    options: Options,
    timings: Path | None,
    enter: Callable[[str], None],
) -> bytes:
    """Compile one graph, strongly typed as it was exported.

    Attention is marked decomposable: a fused kernel is used where there is one, instead of failing where
    there is none.

    Args:
        graph: an ONNX file.
        component: its tensors.
        profiles: the shapes to serve.
        backend: a name of `FLAVOURS`.
        options: with targets, if the flavour has them.
        timings: file of the timing cache, which is used if it exists and written; None is none.
        enter: is told "parse" and "build".

    Raises:
        BackendError: the flavour is not installed.
        BuildError: the parser or the builder refuses, with its own words.
    """
    choose_flavour(backend)
    from polygraphy.backend import trt

    enter("parse")
    with _words(f"{component_name(graph)}: {backend}") as ask:
        # Later versions than 10 know no other networks, and ignore that it is asked for.
        parsed = trt.NetworkFromOnnxPath(str(graph), strongly_typed=True)
        network = ask(trt.SetDecomposableAttentions(parsed))
        _check_network(network[1], component)
        enter("build")
        config = ask(lambda: _config(backend, component, profiles, options, timings))
        save = None if timings is None else str(timings)
        plan = bytes(ask(trt.EngineBytesFromNetwork(network, config, save_timing_cache=save)))
    if options.targets:
        _check_targets(plan, options.targets)
    return plan


def choose_flavour(backend: str) -> None:
    """Polygraphy works with one of the two flavours, for which it decides when it is first imported."""
    load(backend)
    wanted = backend == "tensorrt-rtx"
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(wanted))
    try:
        from polygraphy import config
    except ImportError as cause:
        raise BackendError(f"polygraphy is not installed: {FLAVOURS[backend].remedy}") from cause
    if wanted != config.USE_TENSORRT_RTX:
        raise BackendError(
            f"this process has set up Polygraphy for the other TensorRT: compile for {backend} in a new one"
        )


def _config(
    backend: str,
    component: Component,
    profiles: Sequence[Profile],
    options: Options,
    timings: Path | None,
) -> Any:
    from polygraphy.backend import tensorrt_rtx, trt

    shapes = []
    for profile in profiles:
        one = trt.Profile()
        for spec in component.inputs:
            one.add(spec.name, *profile.shapes(spec))
        shapes.append(one)
    module = load(backend)
    common = {
        "profiles": shapes,
        "builder_optimization_level": options.level,
        "memory_pool_limits": options.workspace and {module.MemoryPoolType.WORKSPACE: options.workspace},
        "refittable": options.refit,
        "weight_streaming": options.weight_streaming,
    }
    if not FLAVOURS[backend].ahead_of_time:
        known = str(timings) if timings is not None and timings.is_file() else None
        return trt.CreateConfig(load_timing_cache=known, **common)
    targets = [tuple(map(int, target.split("."))) for target in options.targets]
    return tensorrt_rtx.CreateConfigRTX(compute_capabilities=targets, **common)


def _check_network(network: INetworkDefinition, component: Component) -> None:
    """The parsed network must have the tensors of the manifest."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for specs, tensors in ((component.inputs, inputs), (component.outputs, outputs)):
        wanted = sorted(_describe_spec(spec) for spec in specs)
        found = sorted(_describe_tensor(tensor) for tensor in tensors)
        if wanted != found:
            raise BuildError(
                f"{component.graph}: graph and manifest disagree, tensors are {', '.join(found) or 'none'}; "
                f"should be {', '.join(wanted)}. Export the bundle again"
            )


def _describe_spec(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} of rank {len(spec.shape)}"


def _describe_tensor(tensor: ITensor) -> str:
    dtype = tensor.dtype.name
    return f"{tensor.name} {_DTYPES.get(dtype, dtype)} of rank {len(tensor.shape)}"


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
