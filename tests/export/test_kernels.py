"""Operators in the graph that ONNX Runtime alone reads: the same values, from kernels that it has."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from allaprima.bundle import open_bundle, resolve
from allaprima.export.kernels import DOMAIN, use_kernels

B = 2
OPSET = '<ir_version: 10, opset_import: ["" : 23, "com.example" : 1]>'
ATTENTION = """
small (float[B,L,24] x, float[B,M,24] y, float[B,1,L,M] mask) => (float[B,L,WIDE] z, float[B,3,L,WIDTH] seen)
<float[B,3,L,8] q, float[B,3,M,8] k, float[B,3,M,WIDTH] v,
 int64[4] split = {0, 0, 3, 8}, int64[3] merged = {0, 0, WIDE}>
{
    a = Reshape (x, split)
    b = Reshape (y, split)
    q = Transpose <perm = [0, 2, 1, 3]> (a)
    k = Transpose <perm = [0, 2, 1, 3]> (b)
    v = VALUES (k)
    c = NODE
    seen = Identity (c)
    d = Transpose <perm = [0, 2, 1, 3]> (c)
    z = Reshape (d, merged)
}"""
GROUPS = """
small (float[B,6,L,M] x) => (float[B,6,L,M] y)
<float[B,6,L,M] a, float[B,6,LM] c, int64[3] flat = {0, 0, -1},
 float[6] scale = {1, 2, -3, 4, 0, 0.5}, float[6] bias = {0, 1, 2, 3, 4, 5}>
{
    a = Mul (x, x)
    b = GroupNormalization ATTRIBUTES (a, scale, bias)
    c = Reshape (b, flat)
    d = GroupNormalization <num_groups = 2> (c, scale, bias)
    shape = Shape (x)
    y = Reshape (d, shape)
}"""


def attention(node: str = "Attention (q, k, v)", values: int = 8) -> onnx.ModelProto:
    """Three heads of 8 channels, and the attention itself among the outputs."""
    text = ATTENTION.replace("NODE", node).replace("WIDTH", str(values)).replace("WIDE", str(3 * values))
    text = text.replace("VALUES (k)", "Identity (k)" if values == 8 else "Concat <axis = 3> (k, k)")
    return onnx.parser.parse_model(OPSET + text)


def groups(attributes: str) -> onnx.ModelProto:
    """Of a tensor of four dimensions, and then of three."""
    return onnx.parser.parse_model(OPSET + GROUPS.replace("ATTRIBUTES", attributes))


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def run(model: onnx.ModelProto, **sizes: tuple[int, ...]) -> list[Any]:
    generator = np.random.default_rng(1)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {name: generator.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    return list(session.run(None, feeds))


def same(model: onnx.ModelProto, kernels: onnx.ModelProto, **sizes: tuple[int, ...]) -> None:
    for wanted, found in zip(run(model, **sizes), run(kernels, **sizes), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("node", "values"),
    [
        ("Attention (q, k, v)", 8),
        ("Attention <scale = 0.5> (q, k, v)", 8),
        ("Attention <is_causal = 0, softcap = 0.0> (q, k, v)", 16),
    ],
)
def test_attention_without_a_mask(node: str, values: int) -> None:
    plain, model = attention(node, values), attention(node, values)
    use_kernels(model)
    onnx.checker.check_model(model)
    assert [each.op_type for each in model.graph.node if each.domain] == ["MultiHeadAttention"]
    assert "Attention" not in operators(model)
    assert (DOMAIN, 1) in {(each.domain, each.version) for each in model.opset_import}
    for length, others in ((5, 7), (600, 600), (1, 300)):
        same(plain, model, x=(B, length, 24), y=(B, others, 24), mask=(B, 1, length, others))


@pytest.mark.parametrize(
    "node",
    [
        "Attention (q, k, v, mask)",
        "Attention <is_causal = 1> (q, k, v)",
        "Attention <softcap = 2.0> (q, k, v)",
        "com.example.Attention (q, k, v)",
    ],
)
def test_what_is_more_than_attention_stays(node: str) -> None:
    model = attention(node)
    before = model.SerializeToString()
    use_kernels(model)
    assert model.SerializeToString() == before


def test_heads_that_nobody_knows() -> None:
    model = attention()
    (query,) = (value for value in model.graph.value_info if value.name == "q")
    query.type.tensor_type.shape.dim[1].dim_param = "H"
    before = operators(model)
    use_kernels(model)
    assert operators(model) == before
    del model.graph.value_info[:]
    use_kernels(model)
    assert operators(model) == before


def test_heads_that_share_a_key() -> None:
    model = attention()
    (key,) = (value for value in model.graph.value_info if value.name == "k")
    key.type.tensor_type.shape.dim[1].dim_value = 1
    before = operators(model)
    use_kernels(model)
    assert operators(model) == before


@pytest.mark.parametrize("attributes", ["<num_groups = 3>", "<num_groups = 6, epsilon = 0.1>"])
def test_groups_are_instances(attributes: str) -> None:
    plain, model = groups(attributes), groups(attributes)
    use_kernels(model)
    onnx.checker.check_model(model)
    assert operators(model).count("InstanceNormalization") == 2
    assert "GroupNormalization" not in operators(model)
    assert DOMAIN not in {each.domain for each in model.opset_import}
    for sides in ((4, 5), (1, 1), (32, 16)):
        same(plain, model, x=(B, 6, *sides))


def test_groups_of_what_nobody_knows() -> None:
    model = groups("<num_groups = 3>")
    del model.graph.value_info[:]
    before = model.SerializeToString()
    use_kernels(model)
    assert model.SerializeToString() == before


def test_the_shipped_denoiser_has_kernels_for_all() -> None:
    """What is exported for every other library is the standard operator."""
    bundle = open_bundle(resolve("shapes"))
    component = bundle.component("denoiser")
    assert component.float32_graph is not None
    standard, own = (
        operators(onnx.load(str(bundle.path(path)), load_external_data=False))
        for path in (component.graph, component.float32_graph)
    )
    for one, other in (("Attention", "MultiHeadAttention"), ("GroupNormalization", "InstanceNormalization")):
        assert standard.count(one) == own.count(other) > 10
        assert standard.count(other) == own.count(one) == 0
