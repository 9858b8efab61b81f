"""The graph with rounded activations and weights: what is rounded, what is not, and that it computes that."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from allaprima.bundle import BundleError
from allaprima.engine.graph import WEIGHTS, Graph, Weight, kind_of, write_weights
from allaprima.engine.layers import find_entrances
from allaprima.engine.qdq import Rounded, plan_rounding, write_rounded
from allaprima.engine.rounding import Range

SHAPES = {
    "unet.conv_in.weight": (8, 3, 3, 3),
    "unet.middle.weight": (8, 8, 3, 3),
    "unet.conv_out.weight": (3, 8, 3, 3),
    "unet.norm.weight": (8,),
    "unet.norm.bias": (8,),
    "unet.to_q.weight": (6, 8),
    "unet.to_k.weight": (6, 8),
    "unet.text_proj.weight": (8, 5),
}
# A convolution at each end and one between, a norm before two products, and one product of the text.
NODES = """
net (float[B, 3, H, W] sample, float[B, L, 5] text) => (float[B, L, 6] y, float[B, 3, H, W] z) {
    a = Conv <pads = [1, 1, 1, 1]> (sample, conv_in)
    b = Sigmoid (a)
    c = Conv <pads = [1, 1, 1, 1]> (b, middle)
    d = Sigmoid (c)
    z = Conv <pads = [1, 1, 1, 1]> (d, conv_out)
    told = Transpose <perm = [1, 0]> (text_proj)
    e = MatMul (text, told)
    n = LayerNormalization (e, norm_w, norm_b)
    q_t = Transpose <perm = [1, 0]> (to_q)
    k_t = Transpose <perm = [1, 0]> (to_k)
    q = MatMul (n, q_t)
    k = MatMul (n, k_t)
    y = Add (q, k)
}
"""
NAMES = dict(
    zip(
        ("conv_in", "middle", "conv_out", "norm_w", "norm_b", "to_q", "to_k", "text_proj"),
        SHAPES,
        strict=True,
    )
)


def weight(array: np.ndarray) -> Weight:
    return Weight(kind_of(array.dtype), array.shape, lambda: array)


def values(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    made = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    made["unet.norm.weight"] = np.geomspace(0.05, 20, 8).astype(np.float32)  # far from even
    return {name: array.astype(dtype) for name, array in made.items()}


def write(folder: Path, dtype: Any = np.float32) -> Graph:
    """The graph above with its weights beside it, in float32 or float16 as a whole."""
    text = NODES if dtype == np.float32 else NODES.replace("float[", "float16[")
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]>{text}')
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = NAMES.get(name, name)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: weight(array) for name, array in values(dtype).items()}
    model.graph.initializer.extend(write_weights(stored, folder / WEIGHTS))
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path))
    return Graph(path)


def inputs(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(6)
    shapes = {"sample": (2, 3, 6, 5), "text": (2, 7, 5)}
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def run(path: Path, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [np.asarray(each, np.float32) for each in session.run(None, given)]


def activations(folder: Path, names: list[str], given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the reference makes of values within the graph."""
    model = onnx.load(folder / "model.onnx")
    for name in names:
        model.graph.output.append(onnx.helper.make_value_info(name, onnx.TypeProto()))
    made = ReferenceEvaluator(model).run(names, given)
    return {name: np.asarray(each, np.float32) for name, each in zip(names, made, strict=True)}


def rounded(graph: Graph, target: Path, dtype: Any = np.float32) -> list[Rounded]:
    entrances, _ = find_entrances(graph)
    seen = activations(graph.folder, [each.name for each in entrances], inputs(dtype))
    plan = []
    for each in entrances:
        rows = seen[each.name]
        rows = (rows.transpose(0, 2, 3, 1) if each.convolves else rows).reshape(-1, each.channels)
        plan.append(plan_rounding(graph, each, Range(np.abs(rows).max(0), rows)))
    target.mkdir(parents=True, exist_ok=True)
    write_rounded(graph, plan, target / "model.onnx")
    return plan


def test_what_is_rounded(tmp_path: Path) -> None:
    """Neither the ends of the network nor what is made of the text alone."""
    graph = write(tmp_path)
    entrances, total = find_entrances(graph)
    found = {each.name: [layer.weight for layer in each.layers] for each in entrances}
    assert found == {"b": ["unet.middle.weight"], "n": ["unet.to_q.weight", "unet.to_k.weight"]}
    assert total == 6
    convolution, product = entrances
    assert (convolution.channels, convolution.convolves, convolution.givers) == (8, True, ())
    assert (product.channels, product.convolves) == (8, False)
    assert product.givers == ("unet.norm.weight", "unet.norm.bias")


def test_a_norm_that_others_use_too_takes_no_factors(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.output.append(onnx.helper.make_tensor_value_info("n", 1, None))
    path.write_bytes(model.SerializeToString())
    entrances, _ = find_entrances(Graph(path))
    assert [each.givers for each in entrances] == [(), ()]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_graph_computes_what_was_planned(tmp_path: Path, dtype: Any) -> None:
    """Standard operators, in the graph's own type, close to the graph before, and the same everywhere."""
    graph = write(tmp_path / "float", dtype)
    plan = rounded(graph, tmp_path / "int8", dtype)
    path = tmp_path / "int8" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    count = Counter(node.op_type for node in model.graph.node)
    assert (count["QuantizeLinear"], count["DequantizeLinear"], count["Transpose"]) == (2, 2 + 3, 1)
    stored = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    assert (stored["unet.to_q.weight"].dtype, stored["unet.to_q.weight"].shape) == (np.int8, (8, 6))
    assert (stored["unet.middle.weight"].dtype, stored["unet.middle.weight"].shape) == (np.int8, (8, 8, 3, 3))
    assert stored["unet.middle.weight_scale"].dtype == stored["b_scale"].dtype == dtype
    assert np.array_equal(stored["unet.conv_in.weight"], values(dtype)["unet.conv_in.weight"])
    given = inputs(dtype)
    before, after = run(tmp_path / "float" / "model.onnx", given), run(path, given)
    for one, other in zip(before, after, strict=True):
        error = np.sqrt(np.square(one - other).mean()) / one.std()
        assert 1e-4 < error < 0.03
    reference = ReferenceEvaluator(model).run(None, given)
    for one, other in zip(after, reference, strict=True):
        # A value near the middle of a step may fall to either side.
        assert np.sqrt(np.square(one - np.asarray(other, np.float32)).mean()) < 0.005 * one.std()
    assert all(each.error < 0.02 for each in plan)


def test_channels_are_evened_out_by_the_norm(tmp_path: Path) -> None:
    graph = write(tmp_path / "float")
    plan = {each.entrance.name: each for each in rounded(graph, tmp_path / "int8")}
    assert plan["b"].factors is None
    factors = plan["n"].factors
    assert factors is not None
    assert factors.max() / factors.min() > 3
    stored = Graph(tmp_path / "int8" / "model.onnx")
    for name in ("unet.norm.weight", "unet.norm.bias"):
        assert np.allclose(stored.read(name), values()[name] / factors, rtol=1e-6)
    product = stored.read("unet.to_q.weight") * stored.read("unet.to_q.weight_scale")
    assert np.abs(product - values()["unet.to_q.weight"].T * factors[:, None]).max() < 0.05


def test_weights_are_what_safetensors_reads(tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.numpy").load_file
    given = {
        "unet.a": np.arange(3, dtype=np.int8),
        "unet.b": np.float16([[1, 2], [3, 4]]),
        "c": np.zeros((0, 2), np.float32),
    }
    write_weights({name: weight(array) for name, array in given.items()}, tmp_path / WEIGHTS)
    read = load_file(tmp_path / WEIGHTS)
    assert set(read) == {"a", "b", "c"}
    for name, array in given.items():
        found = read[name.removeprefix("unet.")]
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)


def test_names_that_would_become_one_are_kept(tmp_path: Path) -> None:
    names = ["unet.a", "vae.a"]
    tensors = write_weights(
        {name: weight(np.float32([index])) for index, name in enumerate(names)}, tmp_path / "w"
    )
    assert [each.name for each in tensors] == names
    assert {each.external_data[1].value for each in tensors} != {tensors[0].external_data[1].value}


def test_a_damaged_bundle_is_said(tmp_path: Path) -> None:
    graph = write(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"short")
    with pytest.raises(BundleError, match=r"unet.middle.weight cannot be read"):
        graph.read("unet.middle.weight")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="cannot be read as an ONNX graph"):
        Graph(tmp_path / "model.onnx")
