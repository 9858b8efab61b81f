"""Writing the graph of a step in which activations and weights are rounded to 8 bits.

Each activation goes through a QuantizeLinear and a DequantizeLinear, each weight is stored in 8 bits before a
DequantizeLinear: standard operators, which say what is computed in words that every backend understands.
Those that have kernels for 8 bits move the DequantizeLinear behind the product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from allaprima.bundle import BundleError
from allaprima.engine.graph import WEIGHTS, Array, Graph, Weight, kind_of, write_weights
from allaprima.engine.layers import Entrance, Layer
from allaprima.engine.rounding import Floats, Range, choose_scale, even_out, round_weight

_SCALE = "_scale"
_ZERO = "int8_zero_point"


@dataclass(frozen=True)
class Rounded:
    """An activation, what it is divided by, and what its channels [C] are divided by before.

    `error` is the root mean square of the rounding over that of the values. No `factors` are ones.
    """

    entrance: Entrance
    scale: float
    factors: Floats | None
    error: float


def plan_rounding(graph: Graph, entrance: Entrance, seen: Range) -> Rounded:
    """The best scale for what was seen of an activation, its channels evened out where its norm can do it."""
    dtype = graph.dtype(entrance.layers[0].weight)
    factors = None
    if entrance.norm is not None:
        most = np.max([_largest(graph, layer) for layer in entrance.layers], axis=0)
        factors = even_out(seen.largest, most)
        seen = seen.divided(factors)
    scale, error = choose_scale(seen, dtype)
    return Rounded(entrance, scale, factors, error)


def _largest(graph: Graph, layer: Layer) -> Floats:
    """The largest magnitude of the weights that multiply each channel [C]."""
    weight = np.abs(graph.read(layer.weight).astype(np.float32))
    return np.asarray(weight.max(axis=(0, *range(2, weight.ndim))), np.float32)


def write_rounded(graph: Graph, plan: Sequence[Rounded], path: Path) -> None:
    """Write the graph with these activations, and the weights of the layers that take them, rounded.

    The weights go beside `path`. Raises BundleError if the graph made is not valid, OSError.
    """
    weights = {name: _unchanged(graph, name) for name in graph.stored()}
    small: list[Any] = [numpy_helper.from_array(np.int8(0), _ZERO)]
    before: dict[str, list[Any]] = {}
    dropped: set[str] = set()
    swapped: dict[str, tuple[str, str]] = {}
    for each in plan:
        name = each.entrance.name
        dtype = graph.dtype(each.entrance.layers[0].weight)
        small.append(numpy_helper.from_array(np.asarray(each.scale, dtype), f"{name}{_SCALE}"))
        before[each.entrance.layers[0].output] = _pair(name)
        for parameter in () if each.factors is None else [n for n in each.entrance.norm.input[1:] if n]:
            weights[parameter] = _divided(graph, parameter, each.factors)
        for layer in each.entrance.layers:
            swapped[layer.output] = f"{name}/dequantized", f"{layer.weight}/dequantized"
            before.setdefault(layer.output, []).append(_dequantize(layer))
            dropped |= {layer.transpose} - {""}
            weights |= _rounded(graph, layer, each.factors)
    nodes = []
    for node in graph.model.graph.node:
        if node.output[0] in dropped:
            continue
        nodes += before.get(node.output[0], [])
        if node.output[0] in swapped:
            node.input[0], node.input[1] = swapped[node.output[0]]
        nodes.append(node)
    constants = [each for name, each in graph.initializers.items() if name not in weights]
    _save(graph, nodes, [*constants, *small, *write_weights(weights, path.parent / WEIGHTS)], dropped, path)


def _save(graph: Graph, nodes: list[Any], initializers: list[Any], dropped: set[str], path: Path) -> None:
    made = graph.model.graph
    infos = [info for info in made.value_info if info.name not in dropped]
    # Copies: clearing a repeated field lets go of what is in it.
    nodes, infos = [_copied(node) for node in nodes], [_copied(info) for info in infos]
    initializers = [_copied(each) for each in initializers]
    for field, values in ((made.node, nodes), (made.value_info, infos), (made.initializer, initializers)):
        del field[:]
        field.extend(values)
    path.write_bytes(graph.model.SerializeToString())
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:
        raise BundleError(f"the quantized graph is not valid ONNX: {error}") from error


def _copied(message: Any) -> Any:
    made = type(message)()
    made.CopyFrom(message)
    return made


def _pair(name: str) -> list[Any]:
    """The two nodes through which an activation goes."""
    scale, narrow = f"{name}{_SCALE}", f"{name}/quantized"
    return [
        helper.make_node("QuantizeLinear", [name, scale, _ZERO], [narrow], f"{name}/quantize"),
        helper.make_node(
            "DequantizeLinear", [narrow, scale, _ZERO], [f"{name}/dequantized"], f"{name}/dequantize"
        ),
    ]


def _dequantize(layer: Layer) -> Any:
    """The node that makes a weight of its 8 bits: outputs are axis 0 of a convolution's, 1 of a matrix."""
    return helper.make_node(
        "DequantizeLinear",
        [layer.weight, f"{layer.weight}{_SCALE}"],
        [f"{layer.weight}/dequantized"],
        f"{layer.weight}/dequantize",
        axis=0 if layer.convolves else 1,
    )


def _rounded(graph: Graph, layer: Layer, factors: Floats | None) -> Mapping[str, Weight]:
    """A layer's weight and its scales, by their names. A matrix is stored [in,out], as it is used."""
    dtype = graph.dtype(layer.weight)
    shape = tuple(graph.initializers[layer.weight].dims)

    return {
        layer.weight: Weight(
            kind_of(np.int8),
            shape if layer.convolves else shape[::-1],
            lambda: _round(graph, layer, factors)[0],
        ),
        f"{layer.weight}{_SCALE}": Weight(
            kind_of(dtype), shape[:1], lambda: _round(graph, layer, factors)[1]
        ),
    }


def _round(graph: Graph, layer: Layer, factors: Floats | None) -> tuple[Array, Array]:
    """The values and scales of a layer's weight: computed when they are written, one weight in memory."""
    dtype = graph.dtype(layer.weight)
    weight = graph.read(layer.weight).astype(np.float32)
    if factors is not None:
        weight *= factors.reshape(-1, *(1,) * (weight.ndim - 2))
    values, scale = round_weight(weight, 0, dtype)
    return values if layer.convolves else values.T, scale.astype(dtype)


def _unchanged(graph: Graph, name: str) -> Weight:
    tensor = graph.initializers[name]
    return Weight(tensor.data_type, tuple(tensor.dims), lambda: graph.read(name))


def _divided(graph: Graph, name: str, factors: Floats) -> Weight:
    """A norm's weight or bias [C] over factors."""
    tensor, dtype = graph.initializers[name], graph.dtype(name)
    return Weight(
        tensor.data_type,
        tuple(tensor.dims),
        lambda: (graph.read(name).astype(np.float32) / factors).astype(dtype),
    )
