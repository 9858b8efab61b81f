"""Outputs that are added to a graph, to see what its activations are like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from allaprima.bundle import Component, TensorSpec
from allaprima.engine.graph import Graph
from allaprima.engine.layers import Entrance
from allaprima.engine.rounding import Range
from allaprima.runtime.memory import Tensor

VALUES = 2048
"""So many values of an activation are kept of each step, as whole rows of channels, at least four."""
_LEAST = 4
_UNIT = 2**20


@dataclass(frozen=True)
class Gauge:
    """Two outputs of a graph that tell of an activation: its channels' largest, and some rows of values."""

    entrance: Entrance
    largest: str
    rows: str
    count: int

    @property
    def specs(self) -> tuple[TensorSpec, TensorSpec]:
        """The outputs."""
        channels = self.entrance.channels
        return (
            TensorSpec(self.largest, "float32", (channels,)),
            TensorSpec(self.rows, "float32", (self.count, channels)),
        )


def write_gauged(graph: Graph, entrances: Sequence[Entrance], path: Path) -> list[Gauge]:
    """Write the graph with two further outputs for each activation, to be read from `path`'s folder.

    Rows are taken at random places, the same at each run of one shape. Raises OSError.
    """
    model = type(graph.model)()
    model.CopyFrom(graph.model)
    random = np.random.default_rng(0)
    gauges = []
    for index, entrance in enumerate(entrances):
        count = max(_LEAST, VALUES // entrance.channels)
        gauge = Gauge(entrance, f"gauge_{index}_largest", f"gauge_{index}_rows", count)
        places = random.integers(0, _UNIT, count)
        _add(model.graph, gauge, f"gauge_{index}", places)
        gauges.append(gauge)
    path.write_bytes(model.SerializeToString())
    return gauges


def _add(graph: Any, gauge: Gauge, prefix: str, places: NDArray[np.int64]) -> None:
    """The nodes of a gauge: the activation in float32 as rows [N,C], their largest, and some of them."""
    entrance = gauge.entrance
    nodes = []
    constants = {
        "places": places,
        "unit": np.array(_UNIT),
        "zero": np.array([0]),
        "shape": np.array([-1, entrance.channels]),
    }

    def add(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        made = output if output in (gauge.largest, gauge.rows) else f"{prefix}_{output}"
        nodes.append(helper.make_node(kind, inputs, [made], f"{prefix}_{output}_node", **attributes))
        return made

    given = {name: f"{prefix}_{name}" for name in constants}
    values = add("Cast", [entrance.name], "wide", to=TensorProto.FLOAT)
    if entrance.convolves:
        values = add("Transpose", [values], "last", perm=[0, 2, 3, 1])
    rows = add("Reshape", [values, given["shape"]], "all")
    add("ReduceMax", [add("Abs", [rows], "magnitude"), given["zero"]], gauge.largest, keepdims=0)
    count = add("Shape", [rows], "count", start=0, end=1)
    wanted = add("Div", [add("Mul", [given["places"], count], "product"), given["unit"]], "wanted")
    add("Gather", [rows, wanted], gauge.rows, axis=0)
    graph.node.extend(nodes)
    graph.initializer.extend(
        numpy_helper.from_array(value.astype(np.int64), given[name]) for name, value in constants.items()
    )
    graph.output.extend(
        helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, list(spec.shape)) for spec in gauge.specs
    )


def gauged(component: Component, gauges: Sequence[Gauge]) -> Component:
    """The component with the outputs of gauges."""
    more = tuple(spec for gauge in gauges for spec in gauge.specs)
    return replace(component, outputs=(*component.outputs, *more))


class Ranges:
    """Gathers what gauges say."""

    def __init__(self, gauges: Sequence[Gauge]) -> None:
        self._gauges = gauges
        self._largest: dict[str, NDArray[np.float32]] = {}
        self._rows: dict[str, list[NDArray[np.float32]]] = {gauge.entrance.name: [] for gauge in gauges}

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        """A run ended; its tensors are the host's."""
        for gauge in self._gauges:
            name, largest = gauge.entrance.name, tensors[gauge.largest].array
            self._largest[name] = np.maximum(self._largest.get(name, largest), largest)
            self._rows[name].append(tensors[gauge.rows].array.copy())

    def seen(self, entrance: Entrance) -> Range:
        """All that was seen of an activation."""
        return Range(self._largest[entrance.name], np.concatenate(self._rows[entrance.name]))
