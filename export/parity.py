"""The gate at the end of an export: on random inputs of other shapes, graph and torch module must agree."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from allaprima.bundle import ExportError, Parity, TensorSpec
from allaprima.export.graph import GraphPlan
from allaprima.export.reason import reason

Arrays = dict[str, NDArray[np.generic]]

TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 2e-2}
"""Largest difference over the reference's standard deviation. bf16 graphs are checked widened to float32,
since ONNX Runtime's CPU has no bf16 kernels: this checks the graph and its weights, not the rounding."""
LEVELS = {"fp32": 1, "fp16": 8, "bf16": 1}
"""Largest difference of 8-bit images, in levels."""


@dataclass(frozen=True)
class Trial:
    """Inputs, and what the torch module made of them in float32 with the graph's rounded weights."""

    extents: Mapping[str, int]
    inputs: Arrays
    outputs: Arrays


def reference(plan: GraphPlan, extents: Sequence[Mapping[str, int]], seed: int = 0) -> list[Trial]:
    """Run the plan's module in float32 on random inputs; the module is float32 afterwards."""
    module = plan.module.float()
    random = np.random.default_rng(seed)
    trials = []
    for extent in extents:
        inputs = {spec.name: _draw(plan, spec, extent, random) for spec in plan.inputs}
        with torch.no_grad():
            made = module(*(torch.from_numpy(value) for value in inputs.values()))
        results = made if isinstance(made, tuple) else (made,)
        outputs = {spec.name: result.numpy() for spec, result in zip(plan.outputs, results, strict=True)}
        trials.append(Trial(extent, inputs, outputs))
    return trials


def check(name: str, path: Path, precision: str, trials: Sequence[Trial]) -> tuple[Parity, ...]:
    """Run the graph on every trial and compare.

    Raises:
        ExportError: an output that is not finite, or differs by more than the precision's tolerance.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
        session = _Session(_widen(path, Path(folder)) if precision == "bf16" else path)
        return tuple(_compare(name, precision, trial, session) for trial in trials)


def run_graph(path: Path, batches: Iterable[Arrays], *, widen: bool = False) -> list[Arrays]:
    """What the graph makes of each batch of inputs, by name; `widen` computes in float32 what is bf16.

    Raises:
        ExportError: ONNX Runtime is not installed, or refuses the graph.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
        session = _Session(_widen(path, Path(folder)) if widen else path)
        names = [output.name for output in session.session.get_outputs()]
        return [dict(zip(names, session.run(batch), strict=True)) for batch in batches]


class _Session:
    """ONNX Runtime without optimizations, which would copy the weights."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as cause:
            raise ExportError(
                "checking an export needs ONNX Runtime: pip install 'allaprima[export,ort]'"
            ) from cause
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as cause:
            raise ExportError(f"ONNX Runtime refuses the exported graph: {reason(cause)}") from cause

    def run(self, inputs: Arrays) -> list[NDArray[np.generic]]:
        return list(self.session.run(None, inputs))


def _compare(name: str, precision: str, trial: Trial, session: _Session) -> Parity:
    worst, relative = 0.0, 0.0
    for (output, wanted), got in zip(trial.outputs.items(), session.run(trial.inputs), strict=True):
        if got.shape != wanted.shape:
            raise ExportError(f"{name}: {output} has shape {got.shape}, torch makes {wanted.shape}")
        difference = np.abs(got.astype(np.float64) - wanted.astype(np.float64))
        error = float(difference.max())
        share = error / max(1e-12, float(wanted.astype(np.float64).std()))
        limit = LEVELS[precision] if wanted.dtype == np.uint8 else TOLERANCE[precision]
        if not (error if wanted.dtype == np.uint8 else share) <= limit:
            raise ExportError(
                f"{name} in {precision} is off by {error:.3g} ({share:.3g} standard deviations) in {output} "
                f"at {dict(trial.extents)}: the limit is {limit:g}; try --precision fp32"
            )
        worst, relative = max(worst, error), max(relative, share)
    shapes = {key: value.shape for key, value in trial.inputs.items()}
    return Parity(shapes, worst, relative)


def _draw(
    plan: GraphPlan, spec: TensorSpec, extents: Mapping[str, int], random: np.random.Generator
) -> NDArray[np.generic]:
    """Random values for one input: ids within the vocabulary, timesteps within the schedule, else normal."""
    shape = spec.resolve(extents)
    if spec.dtype == "int64":
        return random.integers(0, _vocabulary(plan.module), shape)
    if spec.name == "timestep":
        return random.uniform(0, 999, shape).astype(np.float32)
    if spec.name == "time_ids":
        return random.integers(0, 1024, shape).astype(np.float32)
    if spec.name == "image":
        return random.uniform(-1, 1, shape).astype(np.float32)
    if spec.name == "thresholds":
        return np.stack([np.full(shape[0], 0.9), np.full(shape[0], 1.5)], axis=1).astype(np.float32)
    if spec.name == "bounds":
        return np.where(random.random(shape) < 0.5, 1.5, 3e38).astype(np.float32)
    return random.standard_normal(shape).astype(np.float32)


def _vocabulary(module: torch.nn.Module) -> int:
    return next(part.num_embeddings for part in module.modules() if isinstance(part, torch.nn.Embedding))


def _widen(path: Path, folder: Path) -> Path:
    """Write the graph with every bf16 tensor in float32; weights beside it, as a graph is at most 2 GB."""
    model = onnx.load(str(path))
    wide, narrow = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    for tensor in model.graph.initializer:
        if tensor.data_type == narrow:
            tensor.CopyFrom(onnx.numpy_helper.from_array(_as_float32(tensor), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == narrow:
                attribute.i = wide
            if attribute.t.data_type == narrow:
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(_as_float32(attribute.t)))
    del model.graph.value_info[:]
    for value in itertools.chain(model.graph.input, model.graph.output):
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    wide_path = folder / path.name
    onnx.save(model, wide_path, save_as_external_data=True, location=f"{path.name}.data")
    return wide_path


def _as_float32(tensor: onnx.TensorProto) -> NDArray[np.float32]:
    return onnx.numpy_helper.to_array(tensor).astype(np.float32)
