"""Operations and bytes of an ONNX graph at given shapes: what any implementation of it must at least do.

Counted are products (MatMul, Gemm, Conv, ConvTranspose, Attention), a multiplication and an addition as two
operations. What lies between them (normalisation, activations, softmax, layout) costs time, but good backends
fuse it, so it counts for nothing here: the distance from the limit shows it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allaprima.bundle import RequestError

WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes of a number."""
SMALL = 1024
"""Elements up to which constants are computed with: shapes and axes are that short."""
Shape = tuple[int, ...]
Shapes = Callable[[str], Shape]


@dataclass(frozen=True)
class Count:
    """What one run of a graph takes.

    `operations` by operator; `weights` and `activations` in elements. Activations are what the counted
    operators read and write, each once.
    """

    operations: Mapping[str, int]
    weights: int
    activations: int

    @property
    def total(self) -> int:
        """All operations."""
        return sum(self.operations.values())

    def bytes(self, precision: str) -> int:
        """Bytes moved, if everything is stored in a precision."""
        return WIDTHS[precision] * (self.weights + self.activations)


def count_graph(path: Path, inputs: Mapping[str, Sequence[int]]) -> Count:
    """Count a graph for the shapes of its inputs. Weights are not read, so it takes little memory.

    Raises RequestError naming the operator whose shapes cannot be found, or that has a graph inside.
    """
    import onnx

    return count_model(onnx.load(path, load_external_data=False), inputs)


def count_model(model: Any, inputs: Mapping[str, Sequence[int]]) -> Count:
    """As `count_graph`, for a ModelProto."""
    known = Inference(model, inputs)
    operations: Counter[str] = Counter()
    weights = activations = 0
    for node in model.graph.node:
        known.visit(node)
        if node.op_type not in PRODUCTS or node.domain not in ("", "ai.onnx"):
            continue
        operations[node.op_type] += PRODUCTS[node.op_type](node, known.shape)
        for name in (*node.input, *node.output):
            if name in known.weights:
                weights += math.prod(known.shape(name))
            elif name:
                activations += math.prod(known.shape(name))
    return Count(dict(operations), weights, activations)


class Inference:
    """Shapes of all tensors of a graph, found node by node.

    onnx infers whole graphs too, but stops at operators that are defined as functions, as GroupNormalization
    is, and at shapes that are computed in the graph. Here both go on.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Sequence[int]]) -> None:
        import onnx

        self._onnx = onnx
        self._versions = {each.domain: each.version for each in model.opset_import}
        self._imports = list(model.opset_import)
        self._types: dict[str, Any] = {}
        self._values: dict[str, Any] = {}
        self.weights = {tensor.name for tensor in model.graph.initializer}
        for tensor in model.graph.initializer:
            self._note(tensor.name, tensor.data_type, tensor.dims)
            external = tensor.data_location == onnx.TensorProto.EXTERNAL
            if math.prod(tensor.dims) <= SMALL and not external:
                self._values[tensor.name] = onnx.numpy_helper.to_array(tensor)
        for given in model.graph.input:
            if given.name in self.weights:
                continue
            if given.name not in inputs:
                raise RequestError(f"no shape was given for the input '{given.name}'")
            self._note(given.name, given.type.tensor_type.elem_type, inputs[given.name])

    def shape(self, name: str) -> Shape:
        """Of a tensor. Raises RequestError if it could not be found."""
        found = self._types.get(name)
        if found is None or not found.tensor_type.HasField("shape"):
            raise RequestError(f"the shape of '{name}' cannot be found: this graph cannot be counted")
        dims = found.tensor_type.shape.dim
        if not all(dim.HasField("dim_value") for dim in dims):
            raise RequestError(f"the shape of '{name}' is not all numbers: this graph cannot be counted")
        return tuple(int(dim.dim_value) for dim in dims)

    def visit(self, node: Any) -> None:
        """Find the outputs of a node whose inputs were visited before."""
        if any(attribute.type in (5, 10) for attribute in node.attribute):  # GRAPH, GRAPHS
            raise RequestError(
                f"{node.op_type} '{node.name}' has a graph inside: this graph cannot be counted"
            )
        if node.input and all(name in self.weights for name in node.input if name):
            self.weights.update(node.output)  # transposed or cast, and still a weight
        if node.op_type == "Shape":
            return self._evaluate(node, {name: self._stand_in(name) for name in node.input})
        wanted = [name for name in node.input if name]
        if all(name in self._values for name in wanted):
            return self._evaluate(node, {name: self._values[name] for name in wanted})
        self._infer(node, wanted)

    def _stand_in(self, name: str) -> Any:
        """An array of a tensor's shape that takes no memory."""
        import numpy as np

        return np.broadcast_to(np.zeros(1, np.float32), self.shape(name))

    def _evaluate(self, node: Any, values: Mapping[str, Any]) -> None:
        from onnx.reference import ReferenceEvaluator

        results = ReferenceEvaluator(node, opsets=self._versions).run(None, dict(values))
        for name, value in zip(node.output, results, strict=False):
            if name:
                kind = self._onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
                self._note(name, kind, value.shape)
                if value.size <= SMALL:
                    self._values[name] = value

    def _infer(self, node: Any, wanted: Sequence[str]) -> None:
        onnx = self._onnx
        schema = onnx.defs.get_schema(node.op_type, self._versions.get(node.domain, 1), node.domain)
        types = {name: self._types[name] for name in wanted if name in self._types}
        data = {
            name: onnx.numpy_helper.from_array(self._values[name], name)
            for name in wanted
            if name in self._values
        }
        found = onnx.shape_inference.infer_node_outputs(
            schema, node, types, data, opset_imports=self._imports
        )
        for index, name in enumerate(node.output):
            if name in found and found[name].tensor_type.HasField("shape"):
                self._types[name] = found[name]
            elif index == 0 and name and wanted[0] in types:
                # Those defined as functions, which are not inferred, keep the shape of what they are given.
                self._types[name] = types[wanted[0]]

    def _note(self, name: str, kind: int, shape: Sequence[int]) -> None:
        self._types[name] = self._onnx.helper.make_tensor_type_proto(kind, tuple(shape))


def _matmul(node: Any, shape: Shapes) -> int:
    return 2 * math.prod(shape(node.output[0])) * shape(node.input[0])[-1]


def _gemm(node: Any, shape: Shapes) -> int:
    transposed = _attribute(node, "transA", 0)
    return 2 * math.prod(shape(node.output[0])) * shape(node.input[0])[0 if transposed else 1]


def _conv(node: Any, shape: Shapes) -> int:
    """Each output is a sum over the kernel and the channels of its group: the weight's axes but the first."""
    return 2 * math.prod(shape(node.output[0])) * math.prod(shape(node.input[1])[1:])


def _conv_transpose(node: Any, shape: Shapes) -> int:
    return 2 * math.prod(shape(node.input[0])) * math.prod(shape(node.input[1])[1:])


def _attention(node: Any, shape: Shapes) -> int:
    """Queries times keys and weights times values, masked ones too."""
    queries, keys, values = (shape(node.input[index]) for index in range(3))
    past = shape(node.input[4])[2] if len(node.input) > 4 and node.input[4] else 0
    if len(queries) == 4:
        batch, heads, length, width = queries
        others, value_width = keys[2], values[3]
    else:
        heads = _attribute(node, "q_num_heads", 1)
        batch, length, width = queries[0], queries[1], queries[2] // heads
        others, value_width = keys[1], values[2] // _attribute(node, "kv_num_heads", heads)
    return 2 * batch * heads * length * (others + past) * (width + value_width)


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(each.i) for each in node.attribute if each.name == name), default)


PRODUCTS: Mapping[str, Callable[[Any, Shapes], int]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
}
"""Operations of each operator that is counted."""
