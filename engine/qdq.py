"""Writing the graph of a step in which activations and weights are rounded to 8 bits.

Each activation goes through a QuantizeLinear and a DequantizeLinear, each weight is stored in 8 bits before a
DequantizeLinear: standard operators, which say what is computed in words that every backend understands.
Those that have kernels for 8 bits move the DequantizeLinear behind the product.
"""

from __future__ import annotations

from collections.abc import Sequence
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

SCALE = "_scale"
"""What the name of a weight's or an activation's scale ends in."""
ZERO = "int8_zero_point"
"""The initializer of that name."""


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
    """The best scale for what was seen of an activation, its channels evened out where its norm can."""
    dtype = graph.dtype(entrance.layers[0].weight)
    factors = None
    if entrance.givers:
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
    parameters = Parameters(graph, plan)
    weights = {name: parameters.unchanged(name) for name in (*graph.stored(), *parameters.taken)}
    small: list[Any] = [numpy_helper.from_array(np.array(0, np.int8), ZERO)]
    before: dict[str, list[Any]] = {}
    dropped: set[str] = set()
    swapped: dict[str, tuple[str, str]] = {}
    for each in plan:
        name, layers = each.entrance.name, each.entrance.layers
        small.append(scale_of(graph, each))
        before[layers[0].output] = pair(name)
        for layer in layers:
            swapped[layer.output] = f"{name}/dequantized", f"{layer.weight}/dequantized"
            before.setdefault(layer.output, []).append(dequantize(layer, layer.weight))
            dropped |= {layer.weight, layer.transpose} - {""}
            weights |= parameters.rounded(layer, each.factors)
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
    """Write the graph; `dropped` are values that are no more, or of another type."""
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


def pair(name: str) -> list[Any]:
    """The two nodes through which an activation goes."""
    scale, narrow = f"{name}{SCALE}", f"{name}/quantized"
    return [
        helper.make_node("QuantizeLinear", [name, scale, ZERO], [narrow], f"{name}/quantize"),
        helper.make_node(
            "DequantizeLinear", [narrow, scale, ZERO], [f"{name}/dequantized"], f"{name}/dequantize"
        ),
    ]


def scale_of(graph: Graph, plan: Rounded) -> Any:
    """The initializer of an activation's scale."""
    dtype = graph.dtype(plan.entrance.layers[0].weight)
    return numpy_helper.from_array(np.asarray(plan.scale, dtype), f"{plan.entrance.name}{SCALE}")


def dequantize(layer: Layer, weight: str) -> Any:
    """The node that makes a weight of its 8 bits: outputs are axis 0 of a convolution's, 1 of a matrix."""
    return helper.make_node(
        "DequantizeLinear",
        [weight, f"{weight}{SCALE}"],
        [f"{weight}/dequantized"],
        f"{weight}/dequantize",
        axis=0 if layer.convolves else 1,
    )


class Parameters:
    """A graph's parameters as they are to be stored: computed when they are written, one at a time.

    Attributes:
        taken: the factors [C] that a parameter is divided by, by its name.
    """

    def __init__(self, graph: Graph, plan: Sequence[Rounded]) -> None:
        self._graph = graph
        self.taken: dict[str, Floats] = {}
        for each in plan:
            if each.factors is not None:
                self.taken |= dict.fromkeys(each.entrance.givers, each.factors)

    def unchanged(self, name: str) -> Weight:
        """A parameter in its own type, over the factors that it takes up."""
        tensor, dtype = self._graph.initializers[name], self._graph.dtype(name)

        def values() -> Array:
            return self._read(name).astype(dtype) if name in self.taken else self._graph.read(name)

        return Weight(tensor.data_type, tuple(tensor.dims), values)

    def rounded(self, layer: Layer, factors: Floats | None) -> dict[str, Weight]:
        """A layer's weight in 8 bits and its scales, by their names. A matrix is stored [in,out], as used."""
        name, shape = layer.weight, tuple(self._graph.initializers[layer.weight].dims)

        def both() -> tuple[Array, Array]:
            weight = self._read(name)
            if factors is not None:
                weight = weight * factors.reshape(-1, *(1,) * (weight.ndim - 2))
            dtype = self._graph.dtype(name)
            values, scale = round_weight(weight, 0, dtype)
            return values if layer.convolves else values.T, scale.astype(dtype)

        turned = shape if layer.convolves else shape[::-1]
        return {
            name: Weight(kind_of(np.int8), turned, lambda: both()[0]),
            f"{name}{SCALE}": Weight(self._graph.initializers[name].data_type, shape[:1], lambda: both()[1]),
        }

    def _read(self, name: str) -> Floats:
        values: Floats = self._graph.read(name).astype(np.float32)
        return values / self.taken[name] if name in self.taken else values
