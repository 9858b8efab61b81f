"""An exported graph as it is stored: its nodes, who uses what, and the weights beside it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from allaprima.bundle import BundleError

Array = NDArray[Any]
WEIGHTS = "weights.safetensors"
"""A graph's weights, as external data of the ONNX file beside it."""
_NAMES = {
    int(TensorProto.FLOAT): "F32",
    int(TensorProto.FLOAT16): "F16",
    int(TensorProto.BFLOAT16): "BF16",
    int(TensorProto.INT8): "I8",
    int(TensorProto.INT32): "I32",
    int(TensorProto.INT64): "I64",
    int(TensorProto.BOOL): "BOOL",
}
"""What safetensors calls the types of ONNX that weights have."""


class Graph:
    """An ONNX file of a bundle without its weights.

    Attributes:
        model: to be changed in place; what is below is as it was when the file was read.
        initializers: by name.
        producers: the node that makes a value.
        users: the nodes that take a value, each with the place among its inputs.
    """

    def __init__(self, path: Path) -> None:
        """Raises BundleError if it cannot be read."""
        try:
            self.model = onnx.load(str(path), load_external_data=False)
        except Exception as error:
            raise BundleError(f"{path} cannot be read as an ONNX graph: {error}") from error
        self.folder = path.parent
        graph = self.model.graph
        self.initializers: dict[str, TensorProto] = {each.name: each for each in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.users: dict[str, list[tuple[Any, int]]] = defaultdict(list)
        for node in graph.node:
            for place, name in enumerate(node.input):
                self.users[name].append((node, place))

    def count_uses(self, name: str) -> int:
        """How many times a value is used; as an output of the graph too."""
        return len(self.users[name]) + [each.name for each in self.model.graph.output].count(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type of an initializer."""
        return np.dtype(helper.tensor_dtype_to_np_dtype(self.initializers[name].data_type))

    def read(self, name: str) -> Array:
        """The values of an initializer, mapped where they are beside the graph."""
        tensor = self.initializers[name]
        if not external_data_helper.uses_external_data(tensor):
            return np.asarray(numpy_helper.to_array(tensor))
        where = external_data_helper.ExternalDataInfo(tensor)
        file = self.folder / Path(where.location).name  # a bundle's graphs and weights are in one folder
        shape, offset = tuple(tensor.dims), where.offset or 0
        if not np.prod(shape):
            return np.zeros(shape, self.dtype(name))
        try:
            raw = np.memmap(file, np.uint8, "r", offset, (int(np.prod(shape)) * self.dtype(name).itemsize,))
        except (OSError, ValueError) as error:
            raise BundleError(f"{file}: the weight {name} cannot be read: {error}") from error
        return raw.view(self.dtype(name)).reshape(shape)

    def stored(self) -> list[str]:
        """The initializers whose values are beside the graph."""
        return [n for n, each in self.initializers.items() if external_data_helper.uses_external_data(each)]


@dataclass(frozen=True)
class Weight:
    """An initializer that is to be stored: its type, its shape, and what makes its values."""

    kind: int
    shape: tuple[int, ...]
    values: Callable[[], Array]

    @property
    def size(self) -> int:
        """In bytes."""
        return int(np.prod(self.shape)) * np.dtype(helper.tensor_dtype_to_np_dtype(self.kind)).itemsize


def kind_of(dtype: DTypeLike) -> int:
    """ONNX's number for a type of NumPy or ml_dtypes."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def write_weights(weights: Mapping[str, Weight], path: Path) -> list[TensorProto]:
    """Write a safetensors file, one tensor after the other, and make the initializers that refer to it.

    Names lose the wrapper's prefix, as in an export. Raises OSError.
    """
    saved = {name: name.partition(".")[2] or name for name in weights}
    if len(set(saved.values())) < len(saved):
        saved = {name: name for name in weights}
    # The widest first, so that each begins at a multiple of its type's size.
    order = sorted(weights, key=lambda name: (-_itemsize(weights[name]), saved[name]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        weight, begin = weights[name], end
        end += weight.size
        header[saved[name]] = {
            "dtype": _NAMES[weight.kind],
            "shape": list(weight.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    tensors = []
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            weight, begin = weights[name], file.tell()
            values = np.ascontiguousarray(weight.values())
            assert (values.shape, kind_of(values.dtype)) == (weight.shape, weight.kind), name
            file.write(values.tobytes())
            tensors.append(_external(name, weight, path.name, begin))
    return tensors


def _itemsize(weight: Weight) -> int:
    return int(np.dtype(helper.tensor_dtype_to_np_dtype(weight.kind)).itemsize)


def _external(name: str, weight: Weight, file: str, offset: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=weight.kind, dims=weight.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", weight.size)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
