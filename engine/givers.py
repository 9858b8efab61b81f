"""The parameters that can take up a factor for each channel of an activation, so that dividing costs nothing.

All that stands between them and the activation must be linear in each channel, and be used for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from allaprima.engine.graph import Graph

_NORMS = ("LayerNormalization", "GroupNormalization")
_HEADS = [0, 2, 1, 3]
"""The permutation that brings the heads of attention before its tokens, and back."""


@dataclass(frozen=True)
class Giver:
    """An initializer [N,..] whose rows from `start` on are the activation's channels."""

    name: str
    start: int = 0


def find_givers(graph: Graph, activation: str, channels: int, users: int) -> tuple[Giver, ...]:
    """Those that together make an activation of so many channels, which has so many users; none if unknown.

    Known are a norm's weight and bias; the values of an attention; the half of a gated layer (GEGLU) that is
    not the gate.
    """
    if _uses(graph, activation) != users:
        return ()
    producer = graph.producers.get(activation)
    ways: dict[str, Callable[[Graph, Any, int], tuple[Giver, ...]]] = {
        **dict.fromkeys(_NORMS, _of_norm),
        "Reshape": _of_attention,
        "Mul": _of_gate,
    }
    if producer is None or producer.op_type not in ways:
        return ()
    return ways[producer.op_type](graph, producer, channels)


def _uses(graph: Graph, name: str) -> int:
    """How many times a value is used; as an output of the graph too."""
    return len(graph.users[name]) + sum(each.name == name for each in graph.model.graph.output)


def _made_by(graph: Graph, name: str, kind: str) -> Any:
    """The node of a kind that makes a value for one user alone; None if there is none such."""
    producer = graph.producers.get(name)
    return producer if producer is not None and producer.op_type == kind and _uses(graph, name) == 1 else None


def _own(graph: Graph, name: str, rows: int) -> bool:
    """Whether a value is an initializer of so many rows with one user."""
    tensor = graph.initializers.get(name)
    return tensor is not None and _uses(graph, name) == 1 and list(tensor.dims[:1]) == [rows]


def _of_norm(graph: Graph, norm: Any, channels: int) -> tuple[Giver, ...]:
    names = [name for name in norm.input[1:] if name]
    return tuple(map(Giver, names)) if all(_own(graph, name, channels) for name in names) else ()


def _of_attention(graph: Graph, merge: Any, channels: int) -> tuple[Giver, ...]:
    """Values are mixed between tokens, not between channels: Reshape, Transpose, Attention, and back."""
    back = _made_by(graph, merge.input[0], "Transpose")
    attention = None if back is None else _made_by(graph, back.input[0], "Attention")
    there = None if attention is None else _made_by(graph, attention.input[2], "Transpose")
    split = None if there is None else _made_by(graph, there.input[0], "Reshape")
    if split is None or any(list(_attribute(node, "perm")) != _HEADS for node in (back, there)):
        return ()
    return _of_product(graph, split.input[0], channels, 0)


def _of_gate(graph: Graph, product: Any, channels: int) -> tuple[Giver, ...]:
    """Of states * Gelu(gate), both halves of one product: the states."""
    for states, gate in (product.input, reversed(product.input)):
        split, gelu = _made_by(graph, states, "Split"), _made_by(graph, gate, "Gelu")
        if split is not None and gelu is not None and len(split.output) == 2:
            start = channels * list(split.output).index(states)
            return _of_product(graph, split.input[0], 2 * channels, start)
    return ()


def _of_product(graph: Graph, name: str, rows: int, start: int) -> tuple[Giver, ...]:
    """A product with a matrix [N,C] before a Transpose, and perhaps a bias [N] after it."""
    givers = []
    bias = _made_by(graph, name, "Add")
    if bias is not None:
        constants = [each for each in bias.input if each in graph.initializers]
        if len(constants) != 1 or not _own(graph, constants[0], rows):
            return ()
        givers.append(Giver(constants[0], start))
        name = next(each for each in bias.input if each not in constants)
    product = _made_by(graph, name, "MatMul")
    transpose = None if product is None else _made_by(graph, product.input[1], "Transpose")
    if transpose is None or not _own(graph, transpose.input[0], rows):
        return ()
    return (*givers, Giver(transpose.input[0], start))


def _attribute(node: Any, name: str) -> Any:
    return next((each.ints for each in node.attribute if each.name == name), ())
