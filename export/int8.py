"""Weights in 8 bits: those of matrix products, symmetric, with one scale for each output channel."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir
import torch
from onnx_ir import convenience

SCALE = "_scale"
"""What the name of a quantized weight's scales ends in."""
_LARGEST = 127


@dataclass(frozen=True)
class Quantized:
    """A weight [out,in] that is made int8 [in,out] when it is asked for.

    `scale` [out] is rounded to the weight's dtype before the values are divided by it, so that costs nothing.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    @property
    def empty(self) -> torch.Tensor:
        """The shape and dtype of the values."""
        return torch.empty(self.weight.shape[::-1], dtype=torch.int8, device="meta")

    def values(self) -> torch.Tensor:
        """The weight over its scales: int8 [in,out]."""
        steps = self.weight.float() / self.scale.float()[:, None]
        return steps.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8).T.contiguous()


def quantize(weight: torch.Tensor) -> Quantized:
    """Scales for a weight [out,in] by its largest value in each output channel."""
    scale = weight.float().abs().amax(1) / _LARGEST
    smallest = torch.finfo(weight.dtype).tiny
    return Quantized(weight, scale.clamp(min=smallest).to(weight.dtype))


def insert_dequantization(model: onnx_ir.Model, names: Collection[str]) -> dict[str, str]:
    """Take those of the initializers `names` that are weights of matrix products as int8 with scales.

    Each was [out,in] before a Transpose. It is now stored [in,out], since ONNX Runtime fuses a
    DequantizeLinear only with the MatMul right behind it, and would widen the weight as a whole otherwise.
    The new initializers have no values yet. Returns the name of each one's scales.
    """
    scales = {}
    for name in names:
        weight = model.graph.initializers.get(name)
        transpose = None if weight is None else _transpose_of(weight)
        if weight is None or transpose is None or weight.shape is None:
            continue
        rows, columns = weight.shape
        values = onnx_ir.Value(
            name=name, shape=onnx_ir.Shape([columns, rows]), type=onnx_ir.TensorType(onnx_ir.DataType.INT8)
        )
        scale = onnx_ir.Value(name=name + SCALE, shape=onnx_ir.Shape([rows]), type=weight.type)
        made = transpose.outputs[0]
        node = onnx_ir.node("DequantizeLinear", [values, scale], {"axis": 1}, name=f"{name}/dequantize")
        node.outputs[0].name, node.outputs[0].type = f"{name}/dequantized", made.type
        node.outputs[0].shape = onnx_ir.Shape([columns, rows])
        model.graph.insert_before(transpose, node)
        convenience.replace_all_uses_with(made, node.outputs[0])
        model.graph.remove(transpose, safe=True)
        del model.graph.initializers[name]
        for each in (values, scale):
            assert each.name is not None
            model.graph.initializers[each.name] = each
        scales[name] = name + SCALE
    return scales


def _transpose_of(weight: onnx_ir.Value) -> onnx_ir.Node | None:
    """The Transpose between a weight and the matrix products that alone use it."""
    users = [node for node, _ in weight.uses()]
    if len(users) != 1 or users[0].op_type != "Transpose" or weight.shape is None or len(weight.shape) != 2:
        return None
    products = list(users[0].outputs[0].uses())
    right = all(node.op_type == "MatMul" and index == 1 for node, index in products)
    return users[0] if products and right else None
