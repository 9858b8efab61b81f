"""The gate at the end of an export: on random inputs of other shapes, graph and torch module must agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from allaprima.bundle import ExportError, Parity, TensorSpec
from allaprima.export.graph import GraphPlan
from allaprima.export.segments import Arrays, run_graph
from allaprima.export.weights import StoredTensor

TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 2e-2, "int8": 0.2}
"""Largest difference over the reference's standard deviation. bf16 graphs are checked widened to float32,
since ONNX Runtime's CPU has no bf16 kernels: this checks the graph and its weights, not the rounding. For
int8 it is the root mean square difference, and the error of the quantization, of which the reference knows
nothing."""
_REMEDY = ("try --precision fp32", "leave out --text-encoder-weights int8")
_NARROW = (torch.float16, torch.bfloat16)
LEVELS = {"fp32": 1, "fp16": 8, "bf16": 1}
"""Largest difference of 8-bit images, in levels."""


@dataclass(frozen=True)
class Trial:
    """Inputs, and what the torch module made of them in float32 with the graph's rounded weights."""

    extents: Mapping[str, int]
    inputs: Arrays
    outputs: Arrays


def reference(plan: GraphPlan, extents: Sequence[Mapping[str, int]], seed: int = 0) -> list[Trial]:
    """Run the plan's module in float32 on random inputs, with its weights as they are rounded."""
    random = np.random.default_rng(seed)
    trials = []
    for extent in extents:
        inputs = {spec.name: _draw(plan, spec, extent, random) for spec in plan.inputs}
        with torch.no_grad(), _Float32():
            made = plan.module(*(torch.from_numpy(value) for value in inputs.values()))
        results = made if isinstance(made, tuple) else (made,)
        outputs = {spec.name: result.numpy() for spec, result in zip(plan.outputs, results, strict=True)}
        trials.append(Trial(extent, inputs, outputs))
    return trials


class _Float32(TorchFunctionMode):
    """Computes in float32 what is asked for in 16 bits; one weight at a time is widened."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "__get__":  # an attribute: of a dtype, not of the values
            return _widen(func(*args, **(kwargs or {})))
        args, kwargs = tree_map(_widen, (args, kwargs or {}))
        return func(*args, **kwargs)


def _widen(value: object) -> object:
    if isinstance(value, torch.Tensor) and value.dtype in _NARROW:
        # Read first: a weight that is stored in float32 must be rounded to its 16 bits, and then widened.
        return (value.read() if isinstance(value, StoredTensor) else value).float()
    return torch.float32 if isinstance(value, torch.dtype) and value in _NARROW else value


def check(
    name: str, path: Path, precision: str, trials: Sequence[Trial], weights: str | None = None
) -> tuple[Parity, ...]:
    """Run the graph on every trial and compare; `weights` is what they are quantized to.

    Raises:
        ExportError: an output that is not finite, or differs by more than the precision's tolerance.
    """
    made = run_graph(path, [trial.inputs for trial in trials], widen=precision == "bf16")
    kind = precision if weights is None else weights
    return tuple(_compare(name, kind, *pair) for pair in zip(trials, made, strict=True))


def _compare(name: str, precision: str, trial: Trial, made: Arrays) -> Parity:
    worst, relative = 0.0, 0.0
    for output, wanted in trial.outputs.items():
        got = made[output]
        if got.shape != wanted.shape:
            raise ExportError(f"{name}: {output} has shape {got.shape}, torch makes {wanted.shape}")
        difference = np.abs(got.astype(np.float64) - wanted.astype(np.float64))
        error, deviation = float(difference.max()), max(1e-12, float(wanted.astype(np.float64).std()))
        measured = float(np.sqrt(np.square(difference).mean())) if precision == "int8" else error
        share = measured / deviation
        limit = LEVELS[precision] if wanted.dtype == np.uint8 else TOLERANCE[precision]
        if not (error if wanted.dtype == np.uint8 else share) <= limit:
            raise ExportError(
                f"{name} in {precision} is off by {measured:.3g} ({share:.3g} standard deviations) in "
                f"{output} at {dict(trial.extents)}: the limit is {limit:g}; {_REMEDY[precision == 'int8']}"
            )
        worst, relative = max(worst, error), max(relative, error / deviation)
    shapes = {key: value.shape for key, value in trial.inputs.items()}
    return Parity(shapes, worst, relative)


def _draw(
    plan: GraphPlan, spec: TensorSpec, extents: Mapping[str, int], random: np.random.Generator
) -> NDArray[np.generic]:
    """Random values for one input: ids within the vocabulary, timesteps within the schedule, else normal."""
    shape = spec.resolve(extents)
    if spec.dtype == "int64":
        return random.integers(0, _vocabulary(plan.module), shape)
    if spec.name.endswith("attention_mask"):  # a prompt's, and its padding's
        return (np.arange(shape[1]) <= random.integers(0, shape[1], (shape[0], 1))).astype(np.float32)
    if spec.name == "pooling_weights":
        return random.dirichlet(np.ones(shape[1]), shape[0]).astype(np.float32)
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
