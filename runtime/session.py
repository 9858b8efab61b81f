"""The one seam between the runtime and its backends: named tensors, bound once, run many times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from allaprima.bundle import BackendError, TensorSpec
from allaprima.runtime.memory import Memory, Tensor


class Binding(Protocol):
    """A session with all its inputs and outputs in place."""

    def run(self) -> None:
        """Compute once: read the inputs' present contents, write the outputs in place.

        On a device the work is only enqueued, in order with the memory's copies. Raises BackendError if the
        backend fails; the outputs are then undefined.
        """


class Session(Protocol):
    """One graph, loaded by one backend."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """What the graph takes, by name."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """What the graph gives, by name."""

    @property
    def precision(self) -> str:
        """What the heavy arithmetic runs in: "fp32", "fp16" or "bf16"."""

    @property
    def memory(self) -> Memory:
        """Where its tensors must lie."""

    def bind(self, tensors: Mapping[str, Tensor]) -> Binding:
        """Bind tensors of the session's memory, one for every input and every output, writable.

        Nothing is copied, now or later: inputs are read and outputs written where they are. Bindings of one
        session may coexist, with different shapes, and may share tensors as long as they do not run at the
        same time.

        Raises BackendError naming the tensor, what it should be and what it is, or after `close`;
        RequestError for shapes that no engine was built for.
        """

    def unload(self) -> None:
        """Let go of the weights until the next `bind`; bindings made before keep theirs while they exist."""

    def close(self) -> None:
        """Let go of the graph. Bindings made before keep what they need until they are dropped."""


def check_tensors(
    inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec], tensors: Mapping[str, Tensor]
) -> dict[str, int]:
    """Check tensors against the specs of a graph; every session does so when it binds.

    An axis that is a plain name ("B") must have the same size wherever the name occurs, and a product of
    names and numbers ("G*B", "8*H") must have the size that follows. Any other expression is left to the
    backend.

    Returns the size of every axis that is a plain name. Raises BackendError.
    """
    specs = {**inputs, **outputs}
    if specs.keys() != tensors.keys():
        raise BackendError(f"tensors {_difference(specs, tensors)}: the graph has {', '.join(specs)}")
    sizes: dict[str, int] = {}
    for name, spec in specs.items():
        _check_array(spec, tensors[name].array)
        # setdefault: the first tensor that has a name fixes its size, the others are held against it below.
        for axis, size in zip(spec.shape, tensors[name].array.shape, strict=True):
            if isinstance(axis, str) and axis.isidentifier():
                sizes.setdefault(axis, size)
    for name, spec in specs.items():
        wanted = tuple(_size(axis, sizes) for axis in spec.shape)
        if any(
            want not in (None, size) for want, size in zip(wanted, tensors[name].array.shape, strict=True)
        ):
            raise _mismatch(spec, tensors[name].array, sizes)
    _check_overlap(inputs, outputs, tensors)
    return sizes


def check_names(specs: Iterable[str], found: Iterable[str], where: str) -> None:
    """Check that the tensors of a loaded graph are those that the manifest names; BackendError if not."""
    if set(specs) != set(found):
        raise BackendError(
            f"{where}: graph and manifest disagree, tensors {_difference(specs, found)}. "
            "Export the bundle again"
        )


def _difference(wanted: Iterable[str], found: Iterable[str]) -> str:
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    parts = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(unknown)}"] * bool(
        unknown
    )
    return "; ".join(parts)


def _check_array(spec: TensorSpec, array: NDArray[Any]) -> None:
    if array.dtype != np.dtype(spec.dtype) or array.ndim != len(spec.shape):
        raise _mismatch(spec, array, {})
    if not array.flags.c_contiguous:
        raise BackendError(f"tensor '{spec.name}' is not C-contiguous: bind a contiguous array")
    if not array.flags.writeable:  # which OpenVINO asks of inputs too
        raise BackendError(f"tensor '{spec.name}' is read-only: bind a writable array")


def _check_overlap(inputs: Iterable[str], outputs: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    names = [*inputs, *outputs]
    for output in outputs:
        for other in names:
            if other != output and _overlap(tensors[output], tensors[other]):
                raise BackendError(f"output '{output}' overlaps '{other}' in memory: bind separate tensors")


def _overlap(one: Tensor, two: Tensor) -> bool:
    """Exact, since both are contiguous."""
    return one.address < two.address + two.array.nbytes and two.address < one.address + one.array.nbytes


def _size(axis: int | str, sizes: Mapping[str, int]) -> int | None:
    """The size of an axis if it is a number, a known name, or a product of these."""
    if isinstance(axis, int):
        return axis
    factors = [part.strip() for part in axis.split("*")]
    if all(part.isdecimal() or part in sizes for part in factors):
        return math.prod(int(part) if part.isdecimal() else sizes[part] for part in factors)
    return None


def _mismatch(spec: TensorSpec, array: NDArray[Any], sizes: Mapping[str, int]) -> BackendError:
    names = {part.strip() for axis in spec.shape if isinstance(axis, str) for part in axis.split("*")}
    known = ", ".join(f"{name} = {sizes[name]}" for name in sorted(names & sizes.keys()))
    wanted = f"{spec.dtype} [{', '.join(map(str, spec.shape))}]" + (f" with {known}" if known else "")
    return BackendError(f"tensor '{spec.name}' should be {wanted}, not {array.dtype} {list(array.shape)}")
