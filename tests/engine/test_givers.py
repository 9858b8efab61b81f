"""Factors for channels that parameters take up: known patterns give them, what others use does not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx.reference import ReferenceEvaluator

from allaprima.engine.graph import Graph
from allaprima.engine.layers import find_entrances
from allaprima.engine.qdq import Parameters, Rounded

# Attention of two heads of 2, and a gated layer of 3, after norms.
BLOCK = """
<ir_version: 10, opset_import: ["" : 23]>
block (float[B, T, 4] x) => (float[B, T, 4] y)
{
    n = LayerNormalization (x, gamma, beta)
    q_t = Transpose <perm = [1, 0]> (to_q)
    k_t = Transpose <perm = [1, 0]> (to_k)
    v_t = Transpose <perm = [1, 0]> (to_v)
    q = MatMul (n, q_t)
    k = MatMul (n, k_t)
    v = MatMul (n, v_t)
    q_heads = Reshape (q, heads)
    k_heads = Reshape (k, heads)
    v_heads = Reshape (v, heads)
    q_first = Transpose <perm = [0, 2, 1, 3]> (q_heads)
    k_first = Transpose <perm = [0, 2, 1, 3]> (k_heads)
    v_first = Transpose <perm = [0, 2, 1, 3]> (v_heads)
    a = Attention (q_first, k_first, v_first)
    back = Transpose <perm = [0, 2, 1, 3]> (a)
    attended = Reshape (back, merged)
    out_t = Transpose <perm = [1, 0]> (to_out)
    o = MatMul (attended, out_t)
    p_t = Transpose <perm = [1, 0]> (proj)
    wide = MatMul (o, p_t)
    biased = Add (wide, bias)
    states, gate = Split <axis = 2, num_outputs = 2> (biased)
    opened = Gelu (gate)
    gated = Mul (states, opened)
    last_t = Transpose <perm = [1, 0]> (last)
    y = MatMul (gated, last_t)
}
"""
SHAPES = {
    "gamma": (4,),
    "beta": (4,),
    **dict.fromkeys(("to_q", "to_k", "to_v", "to_out"), (4, 4)),
    "proj": (6, 4),
    "bias": (6,),
    "last": (4, 3),
}


def parse(change: Callable[[str], str] = lambda text: text) -> Any:
    """The block with random weights in the graph; `change` its text."""
    model = onnx.parser.parse_model(change(BLOCK))
    random = np.random.default_rng(4)
    for name, shape in SHAPES.items():
        array = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for name, shape in (("heads", [0, -1, 2, 2]), ("merged", [0, -1, 4])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(shape), name))
    return model


def write(path: Path, model: Any) -> Graph:
    path.write_bytes(model.SerializeToString())
    return Graph(path)


def test_what_gives(tmp_path: Path) -> None:
    entrances, total = find_entrances(write(tmp_path / "model.onnx", parse()))
    found = {each.name: [(giver.name, giver.start) for giver in each.givers] for each in entrances}
    assert found == {
        "n": [("gamma", 0), ("beta", 0)],
        "attended": [("to_v", 0)],
        "o": [],
        "gated": [("bias", 0), ("proj", 0)],
    }
    assert total == 6


def test_factors_change_nothing_but_the_activations(tmp_path: Path) -> None:
    """All of them at once: the activations are divided, the products of what takes them are as before."""
    model = parse()
    graph = write(tmp_path / "model.onnx", model)
    entrances, _ = find_entrances(graph)
    random = np.random.default_rng(5)
    plan = [
        Rounded(
            each, 1.0, random.uniform(0.2, 5, each.channels).astype(np.float32) if each.givers else None, 0
        )
        for each in entrances
    ]
    parameters = Parameters(graph, plan)
    arrays = {name: parameters.unchanged(name).values().copy() for name in SHAPES}
    for each in plan:
        for layer in each.entrance.layers:
            arrays[layer.weight] *= 1 if each.factors is None else each.factors
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))
    x = {"x": random.standard_normal((2, 5, 4)).astype(np.float32)}
    names = [each.entrance.name for each in plan]
    for each in (model, changed):
        each.graph.output.extend(onnx.helper.make_value_info(name, onnx.TypeProto()) for name in names)
    before = dict(zip(["y", *names], ReferenceEvaluator(model).run(["y", *names], x), strict=True))
    after = dict(zip(["y", *names], ReferenceEvaluator(changed).run(["y", *names], x), strict=True))
    assert np.allclose(after["y"], before["y"], rtol=1e-4, atol=1e-4)
    for each in plan:
        name, factors = each.entrance.name, 1 if each.factors is None else each.factors
        assert np.allclose(after[name] * factors, before[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        (
            "attended = Reshape (back, merged)",
            "twice = Add (back, back) attended = Reshape (twice, merged)",
            "attended",
        ),
        ("gated = Mul (states, opened)", "gated = Mul (states, gate)", "gated"),
        ("v = MatMul (n, v_t)", "v = MatMul (n, k_t)", "attended"),
        ("perm = [0, 2, 1, 3]> (v_heads)", "perm = [0, 2, 3, 1]> (v_heads)", "attended"),
        ("biased = Add (wide, bias)", "biased = Add (wide, wide)", "gated"),
        ("opened = Gelu (gate)", "opened = Gelu (gate) more = Neg (states)", "gated"),
    ],
)
def test_what_others_use_gives_nothing(tmp_path: Path, old: str, new: str, name: str) -> None:
    assert old in BLOCK
    model = parse(lambda text: text.replace(old, new))
    entrances, _ = find_entrances(write(tmp_path / "model.onnx", model))
    assert {each.name: each.givers for each in entrances}[name] == ()
