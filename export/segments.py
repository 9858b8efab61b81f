"""Running an exported graph on ONNX Runtime a segment at a time, for as little memory as a segment takes.

As a whole it would take the weights three times: the CPU computes fp16 in float32, and converts every weight
before the first layer runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from allaprima.bundle import ExportError
from allaprima.export.reason import reason
from allaprima.export.widening import widen as widen_nodes

Arrays = dict[str, NDArray[np.generic]]
SEGMENT = 2**29
"""Bytes of weights in a segment; one that is larger has a segment of its own."""


def run_graph(
    path: Path, batches: Sequence[Arrays], *, widen: bool = False, segment: int = SEGMENT
) -> list[Arrays]:
    """What the graph makes of each batch of inputs, in plain ONNX Runtime: nothing is optimized.

    Args:
        path: the ONNX file.
        batches: inputs by name.
        widen: compute in float32 what is bf16 in the graph, for which the CPU has no kernels.
        segment: bytes of weights in memory at a time.

    Raises:
        ExportError: ONNX Runtime is not installed, or refuses the graph.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as cause:
        raise ExportError(f"{path} is not an ONNX file: {reason(cause)}") from cause
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    pieces = list(_cut(model.graph.node, weights, segment))
    wanted = [{output.name for output in model.graph.output}]
    for piece in reversed(pieces):  # what is needed after each piece, the last one first
        wanted.append(wanted[-1] | {name for node in piece for name in node.input})
    states = [dict(batch) for batch in batches]
    for piece, later in zip(pieces, reversed(wanted[:-1]), strict=True):
        run = _Segment(model, piece, weights, later, path.parent, widen)
        states = [run(state) for state in states]
    return [{output.name: state[output.name] for output in model.graph.output} for state in states]


def _cut(
    nodes: Sequence[onnx.NodeProto], weights: dict[str, TensorProto], limit: int
) -> Iterator[list[onnx.NodeProto]]:
    """Consecutive nodes with `limit` bytes of weights or less: their order is that of the data."""
    piece: list[onnx.NodeProto] = []
    used: dict[str, int] = {}
    for node in nodes:
        new = {name: _size(weights[name]) for name in node.input if name in weights}
        if piece and sum((used | new).values()) > limit:
            yield piece
            piece, used = [], {}
        piece.append(node)
        used |= new
    if piece:
        yield piece


def _size(tensor: TensorProto) -> int:
    dtype: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return int(math.prod(tensor.dims)) * dtype.itemsize


class _Segment:
    """Consecutive nodes as a graph of their own; `later` is what is needed after them."""

    def __init__(
        self,
        model: onnx.ModelProto,
        nodes: Sequence[onnx.NodeProto],
        weights: dict[str, TensorProto],
        later: set[str],
        folder: Path,
        widen: bool,
    ) -> None:
        taken = {name for node in nodes for name in node.input}
        made = {name for node in nodes for name in node.output if name}
        self.later, self.folder = later, folder
        self.inputs = sorted(taken - made - weights.keys() - {""})
        self.outputs = sorted(made & later)
        own = [weights[name] for name in sorted(taken & weights.keys())]
        # Their types are said, as ONNX Runtime may leave in float32 what it computes in float32 by itself.
        values = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
        kinds = {name: values[name].type.tensor_type.elem_type for name in self.outputs}
        if widen:
            nodes = widen_nodes(nodes, own)
            narrow, wide = TensorProto.BFLOAT16, TensorProto.FLOAT
            kinds = {name: wide if kind == narrow else kind for name, kind in kinds.items()}
        outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
        graph = helper.make_graph(nodes, "segment", [], outputs, own)
        self.model = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        self.session: Any = None

    def __call__(self, state: Arrays) -> Arrays:
        """The values that are still needed, with those that this segment makes."""
        feeds = {name: state[name] for name in self.inputs}
        if self.session is None:
            for name, value in feeds.items():
                kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                self.model.graph.input.append(helper.make_tensor_value_info(name, kind, None))
            self.session = _open(self.model, self.folder)
        made = self.session.run(self.outputs, feeds) if self.outputs else []
        kept = {name: value for name, value in state.items() if name in self.later}
        return kept | dict(zip(self.outputs, made, strict=True))


def _open(model: onnx.ModelProto, folder: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as cause:
        raise ExportError(
            "checking an export needs ONNX Runtime: pip install 'allaprima[export,ort]'"
        ) from cause
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # it keeps what it once had
    options.add_session_config_entry("session.disable_prepacking", "1")  # copies of weights
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as cause:
        raise ExportError(f"ONNX Runtime refuses the exported graph: {reason(cause)}") from cause
