"""Operators as ONNX Runtime has kernels for them on a CPU, for a graph that nothing else reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

DOMAIN = "com.microsoft"
_LENGTH_FIRST = [0, 2, 1, 3]
"""From [batch, heads, length, channels] to [batch, length, heads, channels], and back."""
_PLAIN = {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0}
"""Attributes that ask for nothing more than attention."""


def use_kernels(model: onnx.ModelProto) -> None:
    """Put others of the same values in the place of operators that ONNX Runtime computes badly.

    `Attention` without a mask becomes its own `MultiHeadAttention`, whose kernel goes through the scores
    block by block (https://github.com/microsoft/onnxruntime/pull/20805). That of the standard operator keeps
    all of them, twice: 2 GB for two latents of 64x64 and eight heads, and sixteen times as much for 128x128.
    With a mask both keep them, so those nodes stay as they are.

    `GroupNormalization` has no kernel: some twenty operators stand in for it, which write the whole tensor
    again and again. It becomes an `InstanceNormalization` of the groups, which has one.
    """
    graph = model.graph
    making = _Making({value.name: _shape(value) for value in graph.value_info})
    nodes = [each for node in graph.node for each in making.of(node)]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in making.constants.items())
    if any(node.domain == DOMAIN for node in nodes):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """The sizes of a tensor; 0 for those that are known only at run time."""
    return tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)


class _Making:
    """Makes the nodes, and collects the constants that they need; `shapes` are those of tensors, if known."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = shapes
        self.constants: dict[str, np.ndarray[Any, Any]] = {}

    def of(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """What computes the same: the node itself where nothing else would."""
        given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if node.domain or len(node.output) != 1:
            return [node]
        if node.op_type == "Attention":
            return self._attention(node, given)
        return self._groups(node, given) if node.op_type == "GroupNormalization" else [node]

    def _attention(self, node: onnx.NodeProto, given: Mapping[str, Any]) -> list[onnx.NodeProto]:
        """ONNX Runtime cancels the transpositions against those that are around it."""
        shapes = [self.shapes.get(name, ()) for name in node.input]
        known = len(shapes) == 3 and all(len(each) == 4 and each[1] and each[3] for each in shapes)
        if not known or any(given.get(name, value) != value for name, value in _PLAIN.items()):
            return [node]
        (output,), heads, width = node.output, shapes[0][1], shapes[2][3]
        if any(each[1] != heads for each in shapes):  # several queries share a key
            return [node]
        nodes, merged = [], []
        for source, each, part in zip(node.input, shapes, "qkv", strict=True):
            turned = f"{output}/{part}/turned"
            merged.append(f"{output}/{part}")
            nodes.append(helper.make_node("Transpose", [source], [turned], perm=_LENGTH_FIRST))
            nodes.append(self._reshape(turned, merged[-1], [0, 0, heads * each[3]]))
        scale = {"scale": given["scale"]} if "scale" in given else {}
        made, turned = f"{output}/merged", f"{output}/turned"
        return [
            *nodes,
            helper.make_node("MultiHeadAttention", merged, [made], domain=DOMAIN, num_heads=heads, **scale),
            self._reshape(made, turned, [0, 0, heads, width]),
            helper.make_node("Transpose", [turned], [output], perm=_LENGTH_FIRST),
        ]

    def _groups(self, node: onnx.NodeProto, given: Mapping[str, Any]) -> list[onnx.NodeProto]:
        (source, scale, bias), (output,) = node.input, node.output
        rank, groups = len(self.shapes.get(source, ())), given["num_groups"]
        if rank < 3:
            return [node]
        names = [
            f"{output}/{part}" for part in ("shape", "groups", "even", "back", "scale", "scaled", "bias")
        ]
        shape, grouped, even, back, factor, scaled, term = names
        ones, zeros = f"ones/{groups}", f"zeros/{groups}"
        self.constants[ones] = np.ones(groups, np.float32)
        self.constants[zeros] = np.zeros(groups, np.float32)
        epsilon = given.get("epsilon", 1e-5)
        return [
            helper.make_node("Shape", [source], [shape]),
            self._reshape(source, grouped, [0, groups, -1]),
            helper.make_node("InstanceNormalization", [grouped, ones, zeros], [even], epsilon=epsilon),
            helper.make_node("Reshape", [even, shape], [back]),
            self._reshape(scale, factor, [-1] + [1] * (rank - 2)),
            helper.make_node("Mul", [back, factor], [scaled]),
            self._reshape(bias, term, [-1] + [1] * (rank - 2)),
            helper.make_node("Add", [scaled, term], [output]),
        ]

    def _reshape(self, source: str, target: str, shape: list[int]) -> onnx.NodeProto:
        name = f"shape/{'x'.join(map(str, shape))}"
        self.constants[name] = np.array(shape, np.int64)
        return helper.make_node("Reshape", [source, name], [target])
