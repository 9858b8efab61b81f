"""From a torch module to an ONNX file: opset 23, standard operators, dynamic axes, named weights."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnxscript import optimizer, rewriter
from torch._subclasses.fake_tensor import FakeTensorMode

from allaprima.bundle import ExportError, TensorSpec
from allaprima.export.int8 import SCALE, insert_dequantization, quantize
from allaprima.export.reason import reason
from allaprima.export.weights import Place, StoredTensor, address, read_header, write_weights

OPSET = 23
"""The first opset with `Attention`, which every backend fuses or takes apart by itself."""
WEIGHTS = "weights.safetensors"
"""A graph's parameters, as external data of the ONNX file beside it."""


@dataclass(frozen=True)
class GraphPlan:
    """A module and how to trace it.

    `example` maps each input, in the order of the module's forward, to an example tensor; `axes` names its
    dynamic axes (axis → name, or `torch.export.Dim`); `inputs` and `outputs` are the runtime's contract.
    `shares` is the component whose weights it takes, "" if it has its own.
    """

    name: str
    module: torch.nn.Module
    example: dict[str, torch.Tensor]
    axes: dict[str, dict[int, Any]]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    shares: str = ""


def write_graph(plan: GraphPlan, path: Path, *, int8: bool = False) -> int:
    """Trace the module and write `path` (graph) and, beside it, `WEIGHTS`.

    Weights keep their names and layout, so that they can be swapped later: only what does not depend on them
    is folded. A component that is exported as its checkpoint stores it has the checkpoint's very file. With
    `int8` the weights of matrix products are quantized (see `export.int8`). A plan that shares another
    component's weights finds them in `WEIGHTS`, which is there already.

    Returns the bytes of weights that the graph uses.

    Raises:
        ExportError: the module does not trace, the graph is not valid ONNX, or the disk refuses.
    """
    model = _trace(plan)
    _strip(model)
    state = plan.module.state_dict(keep_vars=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        used = (
            _find_weights(state, model, path.parent)
            if plan.shares
            else _write_weights(state, model, path.parent, int8=int8)
        )
        onnx_ir.save(model, path)
    except OSError as cause:
        raise ExportError(f"{path} cannot be written: {reason(cause)}") from cause
    _check(plan, model, path)
    return used


def _trace(plan: GraphPlan) -> onnx_ir.Model:
    try:
        with torch.no_grad(), _quiet(), _without_values(plan.module):
            program = torch.onnx.export(
                plan.module.eval(),
                tuple(plan.example.values()),
                input_names=list(plan.example),
                output_names=[output.name for output in plan.outputs],
                dynamic_shapes=_dynamic_shapes(plan),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            if program is None:
                raise ExportError("torch.onnx.export gave no program")
            with _hidden(program.model, plan.module.state_dict().keys()), _quick_rules():
                optimizer.optimize_ir(program.model)
            return program.model
    except Exception as cause:
        raise ExportError(f"{plan.name} does not trace to ONNX: {reason(cause)}") from cause


def _dynamic_shapes(plan: GraphPlan) -> tuple[Any, ...]:
    """The dynamic axes of each argument of the module's forward, those of `*arguments` as one tuple."""
    axes = [plan.axes.get(name) for name in plan.example]
    kinds = [each.kind for each in inspect.signature(plan.module.forward).parameters.values()]
    gathered = inspect.Parameter.VAR_POSITIONAL
    single = kinds.index(gathered) if gathered in kinds else len(axes)
    return (*axes[:single], tuple(axes[single:])) if axes[single:] else tuple(axes)


@contextlib.contextmanager
def _without_values(module: torch.nn.Module) -> Iterator[None]:
    """Put tensors without values in the place of weights on disk: a graph needs only their shapes."""
    owners = [
        owner for part in module.modules() for owner in (vars(part)["_parameters"], vars(part)["_buffers"])
    ]
    places: list[tuple[dict[str, Any], str, StoredTensor]] = [
        (owner, name, weight)
        for owner in owners
        for name, weight in owner.items()
        if isinstance(weight, StoredTensor)
    ]
    fakes: dict[int, torch.Tensor] = {}
    mode = FakeTensorMode()
    for _, _, weight in places:
        with mode:
            empty = torch.empty(weight.shape, dtype=weight.dtype)
        parameter = isinstance(weight, torch.nn.Parameter)
        fakes.setdefault(id(weight), torch.nn.Parameter(empty, requires_grad=False) if parameter else empty)
    try:
        for owner, name, weight in places:
            owner[name] = fakes[id(weight)]
        yield
    finally:
        for owner, name, weight in places:
            owner[name] = weight


@contextlib.contextmanager
def _quick_rules() -> Iterator[None]:
    """Without the optimizer's one rule that looks for pairs of nodes, which takes the square of their number.

    It makes a Split of two Slices that are halves; for SDXL's UNet it takes minutes, to find none.
    """
    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", None)
    if rules is None:  # another onnxscript: slower, but it does the same
        yield
        return
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if rule.name != "SlicesSplit")
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules


@contextlib.contextmanager
def _hidden(model: onnx_ir.Model, names: Iterable[str]) -> Iterator[None]:
    """Take these initializers' values away: the unknown can be neither folded nor merged with its equal."""
    weights = [model.graph.initializers[name] for name in names if name in model.graph.initializers]
    tensors = [weight.const_value for weight in weights]
    for weight in weights:
        weight.const_value = None
    try:
        yield
    finally:
        for weight, tensor in zip(weights, tensors, strict=True):
            weight.const_value = tensor


def _strip(model: onnx_ir.Model) -> None:
    """Remove debugging metadata: it holds absolute paths of this machine, and nine tenths of all bytes."""
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


def _write_weights(
    state: Mapping[str, torch.Tensor], model: onnx_ir.Model, folder: Path, *, int8: bool
) -> int:
    """Move the parameters out of the graph, each under its name without the wrapper's prefix; their bytes."""
    initializers = model.graph.initializers
    quantized = insert_dequantization(model, state.keys()) if int8 else {}
    owners: dict[object, str] = {}  # tied weights are stored once
    names = {
        name: owners.setdefault((address(tensor), tensor.dtype, name in quantized), name.partition(".")[2])
        for name, tensor in state.items()
        if name in initializers
    }
    tensors = {saved: state[name] for name, saved in reversed(names.items())}
    narrow = {names[name]: quantize(state[name]) for name in quantized}
    names |= {scale: names[name] + SCALE for name, scale in quantized.items()}
    tensors |= {saved: each.empty for saved, each in narrow.items()}
    tensors |= {saved + SCALE: each.scale for saved, each in narrow.items()}
    places = write_weights(
        tensors,
        folder / WEIGHTS,
        lambda saved: narrow[saved].values() if saved in narrow else tensors[saved],
    )
    shapes = {name: tensors[saved].shape for name, saved in names.items()}
    return _refer(model, {name: places[saved] for name, saved in names.items()}, shapes)


def _find_weights(state: Mapping[str, torch.Tensor], model: onnx_ir.Model, folder: Path) -> int:
    """Let the parameters of a graph be those of the same name in `folder`'s file of weights; their bytes.

    ExportError if one of them is not there, or is another.
    """
    header = read_header(folder / WEIGHTS)
    places, used = {}, {name: tensor for name, tensor in state.items() if name in model.graph.initializers}
    for name, tensor in used.items():
        saved = name.partition(".")[2]
        place, *kind = header.get(saved, (None,))
        if place is None or kind != [tuple(tensor.shape), tensor.dtype]:
            raise ExportError(f"{folder / WEIGHTS} has no {saved} of {tensor.dtype} {list(tensor.shape)}")
        places[name] = place
    return _refer(model, places, {name: tensor.shape for name, tensor in used.items()})


def _refer(model: onnx_ir.Model, places: Mapping[str, Place], shapes: Mapping[str, torch.Size]) -> int:
    """Let initializers be what is at these places of `WEIGHTS`; the bytes of all."""
    for name, place in places.items():
        initializer = model.graph.initializers[name]
        if initializer.dtype is not None:
            initializer.const_value = onnx_ir.ExternalTensor(
                WEIGHTS,
                place.start,
                place.length,
                initializer.dtype,
                name=name,
                shape=onnx_ir.Shape(shapes[name]),
                base_dir=place.file.parent,
            )
    return sum({place.start: place.length for place in places.values()}.values())


def _check(plan: GraphPlan, model: onnx_ir.Model, path: Path) -> None:
    """The file must be valid, free of foreign operators, and have the tensors of the contract."""
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in model.graph.all_nodes() if node.domain})
    if foreign or model.functions:
        named = [*foreign, *(f"{function.domain}.{function.name}" for function in model.functions.values())]
        raise ExportError(f"{plan.name}: operators outside the standard: {', '.join(named)}")
    try:
        onnx.checker.check_model(str(path))
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as cause:
        raise ExportError(f"{plan.name}: the exported graph is not valid ONNX: {reason(cause)}") from cause
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
