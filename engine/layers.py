"""The layers of a denoiser that can compute in 8 bits, found in its graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from allaprima.engine.graph import Graph

SENSITIVE = ("conv_in", "conv_out", "time_embedding", "time_emb_proj", "add_embedding")
"""What diffusers calls the layers at a UNet's two ends, where the picture itself comes in and out, and those
that make the time: small, and all others depend on them."""
_NORMS = ("LayerNormalization", "GroupNormalization")
_PASSING = ("Cast", "Reshape", "Transpose", "Expand", "Unsqueeze", "Squeeze", "Identity")


@dataclass(frozen=True)
class Layer:
    """A convolution, or the product of rows with a matrix that is stored [out,in] before a Transpose.

    `activation` is what it takes, `weight` the initializer, `channels` C of the activation. `transpose` is
    the name of what the Transpose makes, "" of a convolution.
    """

    node: Any
    activation: str
    weight: str
    channels: int
    transpose: str

    @property
    def convolves(self) -> bool:
        """Whether channels are axis 1 of [B,C,H,W], not the last."""
        return not self.transpose

    @property
    def output(self) -> str:
        """What it makes, by which a node is known: names of nodes need not be there."""
        return str(self.node.output[0])


@dataclass(frozen=True)
class Entrance:
    """An activation [..,C] or [B,C,H,W] that is rounded, and the layers that take it.

    `givers` are the weight and the bias of the norm that makes it for them alone, which can take up a factor
    for each channel; none if there is no such norm.
    """

    name: str
    layers: tuple[Layer, ...]
    givers: tuple[str, ...]

    @property
    def channels(self) -> int:
        """C."""
        return self.layers[0].channels

    @property
    def convolves(self) -> bool:
        """Whether channels are axis 1."""
        return self.layers[0].convolves


def find_entrances(graph: Graph) -> tuple[list[Entrance], int]:
    """All activations that can be rounded, in the graph's order, and how many layers with weights there are.

    Not those of `SENSITIVE` layers, of what comes straight from the graph's inputs (the text's keys and
    values: short, with channels far larger than others), and of matrix products with a bias (Gemm, which
    only makes the time).
    """
    found: dict[str, list[Layer]] = {}
    total = 0
    for node in graph.model.graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        layer = _convolution(graph, node) if node.op_type == "Conv" else _product(graph, node)
        total += node.op_type == "Gemm" or layer is not None
        if layer is None or _sensitive(layer.weight) or _is_given(graph, layer.activation):
            continue
        same = found.setdefault(layer.activation, [])
        if not same or same[0].convolves == layer.convolves:
            same.append(layer)
    return [Entrance(name, tuple(each), _givers(graph, name, each)) for name, each in found.items()], total


def _convolution(graph: Graph, node: Any) -> Layer | None:
    weight = graph.initializers.get(node.input[1])
    groups = next((each.i for each in node.attribute if each.name == "group"), 1)
    if weight is None or groups != 1 or len(weight.dims) != 4 or len(graph.users[weight.name]) > 1:
        return None
    return Layer(node, node.input[0], weight.name, int(weight.dims[1]), "")


def _product(graph: Graph, node: Any) -> Layer | None:
    transpose = graph.producers.get(node.input[1])
    if node.op_type != "MatMul" or transpose is None or transpose.op_type != "Transpose":
        return None
    weight = graph.initializers.get(transpose.input[0])
    if weight is None or len(weight.dims) != 2 or len(graph.users[weight.name]) > 1:
        return None
    if len(graph.users[transpose.output[0]]) > 1:
        return None
    return Layer(node, node.input[0], weight.name, int(weight.dims[1]), transpose.output[0])


def _sensitive(weight: str) -> bool:
    return any(part in SENSITIVE for part in weight.split("."))


def _is_given(graph: Graph, name: str) -> bool:
    """Whether a value is an input of the graph, but for its shape and type."""
    inputs = {each.name for each in graph.model.graph.input}
    while name not in inputs:
        producer = graph.producers.get(name)
        if producer is None or producer.op_type not in _PASSING:
            return False
        name = producer.input[0]
    return True


def _givers(graph: Graph, name: str, layers: list[Layer]) -> tuple[str, ...]:
    norm = graph.producers.get(name)
    if norm is None or norm.op_type not in _NORMS or graph.count_uses(name) != len(layers):
        return ()
    givers = tuple(str(each) for each in norm.input[1:] if each)
    private = all(each in graph.initializers and graph.count_uses(each) == 1 for each in givers)
    return givers if private else ()
