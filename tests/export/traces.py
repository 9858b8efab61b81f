"""Traces that several exports share: most of the time of a tiny export goes by before there is a graph."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir
import torch

from allaprima.export.graph import WEIGHTS, GraphPlan

Trace = Callable[[GraphPlan], onnx_ir.Model]


def shared(trace: Trace, once: Callable[[str, Callable[[Path], object]], Path]) -> Trace:
    """`trace`, but modules that differ in nothing but their weights are traced once for all processes.

    An export compares its graph with the module, so one that was taken for another's would not pass.
    """

    def take(plan: GraphPlan) -> onnx_ir.Model:
        folder = once(f"traces/{_fingerprint(plan)}", lambda folder: _save(trace(plan), plan, folder))
        return onnx_ir.load(folder / "model.onnx")

    return take


def _save(model: onnx_ir.Model, plan: GraphPlan, folder: Path) -> None:
    """Without the weights: where they lie is written by the export."""
    for name in plan.module.state_dict():
        weight = model.graph.initializers.get(name)
        if weight is not None and weight.const_value is not None:
            value = weight.const_value
            weight.const_value = onnx_ir.ExternalTensor(
                WEIGHTS, 0, value.nbytes, value.dtype, name=name, shape=value.shape, base_dir=folder
            )
    folder.mkdir(parents=True)
    onnx_ir.save(model, folder / "model.onnx")


def _fingerprint(plan: GraphPlan) -> str:
    """Of all that a graph depends on: structure, settings, constants, and the plan's own words."""
    module = plan.module
    parts: list[Any] = [
        str(module),
        [(name, tuple(each.shape), each.dtype) for name, each in module.state_dict().items()],
        [(name, tuple(each.shape), each.dtype) for name, each in plan.example.items()],
        [[name, sorted((axis, str(dim)) for axis, dim in axes.items())] for name, axes in plan.axes.items()],
        plan.inputs,
        plan.outputs,
        plan.shares,
    ]
    saved = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name not in saved:  # a constant of the graph
            parts.append((name, buffer.dtype, hashlib.sha256(buffer.numpy().tobytes()).hexdigest()))
    for part in module.modules():
        parts.append((type(part).__qualname__, _settings(vars(part)), _settings(_config(part))))
    return hashlib.sha256(os.fsencode(repr(parts))).hexdigest()[:24]


def _config(part: torch.nn.Module) -> dict[str, Any]:
    config = getattr(part, "config", None) or {}
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def _settings(fields: dict[str, Any]) -> list[tuple[str, Any]]:
    plain = bool | int | float | str | tuple | list | None
    return [
        (name, value)
        for name, value in fields.items()
        if name not in ("training", "_name_or_path") and isinstance(value, plain)
    ]
