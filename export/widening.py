"""Graphs as ONNX Runtime computes them best on a CPU: in float32, over the same weights.

It has no kernels for bf16 there, and few for fp16: it would cast back and forth around those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, numpy_helper

from allaprima.bundle import ExportError
from allaprima.export.kernels import use_kernels
from allaprima.export.reason import reason

WIDE = "/float32"
"""What a widened weight's name ends in."""
NARROW = "/narrow"
"""What the name of rows of a weight ends in before they are widened."""
_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_TYPES = ("to", "dtype", "output_dtype", "precision", "softmax_precision")
"""Attributes that name a type."""
_SMALL = 2**20
"""Bytes of a weight that is written into the graph as float32, rather than converted by each run."""


def widen(nodes: Sequence[onnx.NodeProto], weights: Sequence[TensorProto]) -> list[onnx.NodeProto]:
    """The same with float32 in place of 16 bits; the graph converts the weights: their file will do."""
    narrow = {tensor.name for tensor in weights if tensor.data_type in _NARROW}
    casts: list[onnx.NodeProto] = []
    widened = []
    done: set[str] = set()
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if node.op_type == "Gather" and node.input[0] in narrow:  # a few rows of a large table
            copy.output[:] = [node.output[0] + NARROW]
            widened += [copy, _cast(copy.output[0], node.output[0])]
            continue
        new = [name for name in dict.fromkeys(node.input) if name in narrow - done]
        casts += [_cast(name, name + WIDE) for name in new]
        done.update(new)
        copy.input[:] = [name + WIDE if name in narrow else name for name in node.input]
        for attribute in copy.attribute:
            if attribute.name in _TYPES and attribute.i in _NARROW:
                attribute.i = TensorProto.FLOAT
            if attribute.t.data_type in _NARROW:
                wide = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(wide))
        widened.append(copy)
    return [*casts, *widened]


def _cast(source: str, target: str) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [target], to=TensorProto.FLOAT)


def write_widened(path: Path, target: Path, *, folded: bool) -> None:
    """Write the graph `path` to `target`, beside it, as one that computes in float32 with `use_kernels`.

    Args:
        path: a graph in any precision.
        target: the file to write, in the same folder, since both read the same weights.
        folded: weights are to be widened once, as the graph is loaded; else by each run, and only small ones
            are kept in float32, in `target` itself.

    Raises:
        ExportError: the graph cannot be read, what is written is not valid, or the disk refuses.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        use_kernels(model)
        graph = model.graph
        for tensor in () if folded else graph.initializer:
            if tensor.data_type in _NARROW and 2 * math.prod(tensor.dims) <= _SMALL:
                _embed(tensor, path.parent)
        nodes = widen(graph.node, graph.initializer)
        values = [each for each in graph.value_info if each.type.tensor_type.elem_type not in _NARROW]
        del graph.node[:], graph.value_info[:]
        graph.node.extend(nodes)
        graph.value_info.extend(values)
        onnx.save(model, str(target))
        onnx.checker.check_model(str(target))
    except OSError as cause:
        raise ExportError(f"{target} cannot be written: {reason(cause)}") from cause
    except Exception as cause:
        raise ExportError(f"{path} cannot be widened to float32: {reason(cause)}") from cause


def _embed(tensor: TensorProto, folder: Path) -> None:
    """Put the values of a weight into the graph, in float32."""
    if tensor.data_location == TensorProto.EXTERNAL:
        external_data_helper.load_external_data_for_tensor(tensor, str(folder))
    name = tensor.name
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name))
