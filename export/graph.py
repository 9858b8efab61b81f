"""From a torch module to an ONNX file: opset 23, standard operators, dynamic axes, every weight under its own name."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnxscript import optimizer

from allaprima.bundle import ExportError, TensorSpec

OPSET = 23
"""The first opset with `Attention`, which every backend fuses or takes apart by itself."""


@dataclass(frozen=True)
class GraphPlan:
    """A module and how to trace it.

    `example` maps each input, in the order of the module's forward, to an example tensor; `axes` names its dynamic
    axes (axis → name, or `torch.export.Dim`); `inputs` and `outputs` are the contract with the runtime.
    """

    name: str
    module: torch.nn.Module
    example: dict[str, torch.Tensor]
    axes: dict[str, dict[int, Any]]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def write_graph(plan: GraphPlan, path: Path) -> None:
    """Trace the module and write `path` (graph) and `path`.data (weights).

    Weight names survive: folding is on but for the transposes of weights, so that weights can be swapped later.

    Raises:
        ExportError: the module does not trace, or the graph is not valid ONNX.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                plan.module.eval(),
                tuple(plan.example.values()),
                input_names=list(plan.example),
                output_names=[output.name for output in plan.outputs],
                dynamic_shapes=tuple(plan.axes.get(name) for name in plan.example),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            if program is None:
                raise ExportError(f"{plan.name}: torch.onnx.export gave no program")
            optimizer.optimize_ir(program.model, should_fold=_keeps_weights)
    except ExportError:
        raise
    except Exception as cause:
        raise ExportError(f"{plan.name} does not trace to ONNX: {cause}") from cause
    _strip(program.model)
    onnx_ir.save(program.model, path, external_data=path.name + ".data")
    _check(plan, path)


def _keeps_weights(node: Any) -> bool | None:
    """Whether the optimizer may fold this node; None leaves it to its own rules."""
    weight = node.inputs[0] if node.inputs else None
    return False if node.op_type == "Transpose" and weight is not None and weight.is_initializer() else None


def _strip(model: onnx_ir.Model) -> None:
    """Remove debugging metadata: it holds absolute paths of this machine and nine tenths of the graph's size."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _check(plan: GraphPlan, path: Path) -> None:
    """The file must be valid, free of foreign operators, and have the tensors of the contract."""
    try:
        onnx.checker.check_model(str(path))
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as cause:
        raise ExportError(f"{plan.name}: the exported graph is not valid ONNX: {cause}") from cause
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in graph.node if node.domain})
    if foreign:
        raise ExportError(f"{plan.name}: operators outside the standard: {', '.join(foreign)}")
    for specs, values in ((plan.inputs, graph.input), (plan.outputs, graph.output)):
        wanted, got = [spec.name for spec in specs], [value.name for value in values]
        if wanted != got:
            raise ExportError(f"{plan.name}: the graph has tensors {got} where the contract says {wanted}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's tracing chatter off the terminal: what matters comes back as an exception."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
