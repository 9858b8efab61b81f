"""Which layers cost most in 8 bits: each is rounded alone, and what the network predicts is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from allaprima.bundle import Component, TensorSpec
from allaprima.engine.calibration import HeldOut, Way, predict
from allaprima.engine.graph import Graph, write_weights
from allaprima.engine.qdq import ZERO, Parameters, Rounded, dequantize, pair, scale_of

SWITCHES = "switches"
STEPS = 3
"""So many of the held-out steps are looked at, far apart: errors are larger at some noise levels."""


def measure_each(
    way: Way,
    graph: Graph,
    plan: Sequence[Rounded],
    component: Component,
    held_out: HeldOut,
    tell: Callable[[str], None],
) -> list[float]:
    """The error of the network if only one activation, with the weights of its layers, is rounded.

    Each as `HeldOut.error`. They are nearly independent: together they cost about the root of the sum of
    their squares. One graph in the graph's folder does it all, in as many runs as there are activations.

    Raises BackendError, OSError.
    """
    path = graph.folder / "switched.onnx"
    weights = write_switched(graph, plan, path)
    switched = replace(component, inputs=(*component.inputs, TensorSpec(SWITCHES, "bool", (len(plan),))))
    places = np.unique(np.linspace(0, len(held_out.steps) - 1, STEPS).round().astype(int))
    steps = [held_out.steps[place] for place in places]
    off = np.zeros(len(plan), bool)
    errors = []
    with closing(way.open(path, switched)) as session:
        plain = predict(session, [{**step, SWITCHES: off} for step in steps])
        for index in range(len(plan)):
            tell(f"trying layers {index + 1} of {len(plan)}")
            on = off.copy()
            on[index] = True
            errors.append(HeldOut([{**step, SWITCHES: on} for step in steps], plain).error(session))
    for each in (path, weights):
        each.unlink()
    return errors


def keep_best(plan: Sequence[Rounded], errors: Sequence[float], most: float) -> list[Rounded]:
    """Those of a plan that are rounded if all together shall be off by `most`: without the worst."""
    order = np.argsort(errors, kind="stable")
    total = np.sqrt(np.cumsum(np.square(np.asarray(errors)[order])))
    chosen = set(order[total <= most].tolist())
    return [each for index, each in enumerate(plan) if index in chosen]


@dataclass(frozen=True)
class _Switch:
    """The value that says whether activation `index` is rounded."""

    index: int

    @property
    def name(self) -> str:
        return f"{SWITCHES}/{self.index}"

    def choose(self, rounded: str, plain: str, made: str) -> Any:
        """The node that takes one of two values."""
        return helper.make_node("Where", [self.name, rounded, plain], [made], f"{made}/node")


def write_switched(graph: Graph, plan: Sequence[Rounded], path: Path) -> Path:
    """Write the graph with activations and weights both as they are and rounded, and an input that chooses.

    No factors are applied: they change little. Returns the file of the rounded weights. Raises OSError.
    """
    parameters = Parameters(graph, ())
    weights: dict[str, Any] = {}
    constants = [numpy_helper.from_array(np.array(0, np.int8), ZERO)]
    before: dict[str, list[Any]] = {}
    swapped: dict[str, tuple[str, str]] = {}
    for index, each in enumerate(plan):
        name, switch = each.entrance.name, _Switch(index)
        place = f"{switch.name}/place"
        constants += [numpy_helper.from_array(np.array(index), place), scale_of(graph, each)]
        before[each.entrance.layers[0].output] = [
            helper.make_node("Gather", [SWITCHES, place], [switch.name], f"{switch.name}/node"),
            *pair(name),
            switch.choose(f"{name}/dequantized", name, f"{name}/chosen"),
        ]
        for layer in each.entrance.layers:
            narrow = f"{layer.weight}/narrow"
            for own, values in parameters.rounded(layer, None).items():
                weights[own.replace(layer.weight, narrow)] = values
            chosen = f"{layer.weight}/chosen"
            before.setdefault(layer.output, []).extend(
                [
                    dequantize(layer, narrow),
                    switch.choose(f"{narrow}/dequantized", str(layer.node.input[1]), chosen),
                ]
            )
            swapped[layer.output] = f"{name}/chosen", chosen
    file = path.with_suffix(".safetensors")
    model = type(graph.model)()
    model.CopyFrom(graph.model)
    nodes = [type(node).FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    for node in nodes:
        model.graph.node.extend(before.get(node.output[0], []))
        if node.output[0] in swapped:
            node.input[0], node.input[1] = swapped[node.output[0]]
        model.graph.node.append(node)
    model.graph.initializer.extend([*constants, *write_weights(weights, file)])
    model.graph.input.append(helper.make_tensor_value_info(SWITCHES, TensorProto.BOOL, [len(plan)]))
    path.write_bytes(model.SerializeToString())
    return file
