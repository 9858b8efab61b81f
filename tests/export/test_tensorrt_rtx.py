"""Every graph of a real export compiles with TensorRT-RTX, for shapes and devices that are not here."""

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest

from allaprima.bundle import BackendError, BuildError, Bundle, find_engine
from allaprima.engine import Options, Progress, build_bundle, entries, prune
from allaprima.engine.options import TARGETS
from allaprima.engine.tensorrt import choose_flavour
from allaprima.runtime import flavours

try:
    TRT = flavours.load("tensorrt-rtx")
except BackendError as error:
    pytest.skip(str(error), allow_module_level=True)

DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "UINT8": "uint8"}
COMPONENTS = ["text_encoder", "denoiser", "vae_decoder", "vae_encoder"]
# Real exports, in half and in full precision, and one that has both.
BUNDLES = {
    "tiny_half_bundle": COMPONENTS,
    "tiny_bundle": COMPONENTS,
    "xl_bundle": ["text_encoder_2", *COMPONENTS],
    "kandinsky_bundle": ["prior", "image_encoder", *COMPONENTS],
    "depth_bundle": ["hint_encoder", "denoiser"],
    "kandinsky3_bundle": COMPONENTS,
}


def targets(plan: Path) -> set[str]:
    """What a plan's header says."""
    header = plan.read_bytes()[:64]
    return {name for name, bit in TARGETS.items() if header[32] & bit}


@pytest.mark.parametrize(
    ("bundle", "component"), [(name, part) for name, parts in BUNDLES.items() for part in parts]
)
def test_the_parser_accepts_every_graph(request: pytest.FixtureRequest, bundle: str, component: str) -> None:
    """And every operator in it: no plug-in is called for, and all attention can be taken apart."""
    exported: Bundle = request.getfixturevalue(bundle)
    choose_flavour("tensorrt-rtx")
    from polygraphy.backend.trt import NetworkFromOnnxPath, SetDecomposableAttentions

    described = exported.component(component)
    graph = exported.path(described.graph)
    builder, network, parser = SetDecomposableAttentions(NetworkFromOnnxPath(str(graph)))()
    assert parser.num_errors == 0
    operators = Counter(node.op_type for node in onnx.load(graph, load_external_data=False).graph.node)
    assert [name for name in operators if not parser.supports_operator(name)] == []
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    assert not any("PLUGIN" in layer.type.name for layer in layers)
    attention = [layer for layer in layers if layer.type == TRT.LayerType.ATTENTION_INPUT]
    assert len(attention) == operators["Attention"]
    for layer in attention:
        layer.__class__ = TRT.IAttentionInputLayer
        assert layer.attention.decomposable
    if component not in ("vae_encoder", "hint_encoder"):
        assert attention, "this test would show nothing"
    edges = [
        (described.inputs, network.num_inputs, network.get_input),
        (described.outputs, network.num_outputs, network.get_output),
    ]
    for specs, count, get in edges:
        tensors: list[Any] = [get(index) for index in range(count)]
        found = {one.name: (DTYPES[one.dtype.name], len(one.shape)) for one in tensors}
        assert found == {spec.name: (spec.dtype, len(spec.shape)) for spec in specs}
        for spec, tensor in zip(specs, tensors, strict=True):
            fixed = tuple(axis if isinstance(axis, int) else -1 for axis in spec.shape)
            assert tuple(tensor.shape) == fixed, spec.name
    del parser, network, builder  # in this order: each borrows the next


def test_every_graph_of_an_export_compiles(tiny_half_bundle: Bundle, cache: Path) -> None:
    exported = tiny_half_bundle
    stages: list[Progress] = []
    step = exported.manifest.latent.multiple
    asked: dict[str, Any] = {
        "backend": "tensorrt-rtx",
        "sizes": [(2 * step, step)],
        "batch": (1, 3),
        "options": Options(targets=("8.9", "12.0")),
    }
    built = build_bundle(exported, **asked, progress=stages.append)
    names = list(exported.manifest.components)
    assert sorted(names) == sorted(COMPONENTS)
    assert [one.component for one in built] == names
    assert [stage.stage for stage in stages[:4]] == [
        f"{names[0]}: {stage}" for stage in ("parse", "build", "verify", "save")
    ]
    assert [stage.done for stage in stages] == list(range(4 * len(names)))
    for one in built:
        key, plan = one.engine.key, one.folder / one.engine.main
        assert (key.backend, key.backend_version, key.precision) == ("tensorrt-rtx", TRT.__version__, "fp16")
        assert key.device == "compute capability 8.9, 12.0"
        assert one.engine.error is None  # there is no such GPU here to run it on
        assert targets(plan) == {"8.9", "12.0"}
        assert plan.stat().st_size > sum((exported.folder / name).stat().st_size for name in key.graph) / 2
        assert find_engine(key) == plan
    denoiser = next(one for one in built if one.component == "denoiser")
    assert [profile.extents["B"] for profile in denoiser.engine.key.profiles] == [(1, 1, 1), (2, 3, 3)]
    assert all(profile.extents["G"] == (1, 2, 2) for profile in denoiser.engine.key.profiles)
    assert all(one.stale == "" for one in entries())
    assert prune() == ()
    assert all(one.reused for one in build_bundle(exported, **asked))


@pytest.mark.parametrize(
    ("fixture", "precisions"),
    [
        ("tiny_bundle", {"fp32"}),
        ("tiny_bf16_bundle", {"bf16"}),
        ("xl_bundle", {"fp16", "fp32"}),
        ("kandinsky_bundle", {"fp16"}),
        ("depth_bundle", {"fp32"}),
        ("kandinsky3_bundle", {"fp16", "bf16"}),
    ],
    ids=["fp32", "bf16", "both", "kandinsky", "depth", "kandinsky3"],
)
def test_other_precisions_compile(request: pytest.FixtureRequest, fixture: str, precisions: set[str]) -> None:
    """In float32 attention has no fused kernel, and is taken apart."""
    exported: Bundle = request.getfixturevalue(fixture)
    built = build_bundle(exported, backend="tensorrt-rtx", options=Options(targets=("8.6",)))
    assert {one.engine.key.precision for one in built} == precisions
    assert len(built) == len(exported.manifest.components)
    assert all(targets(one.folder / one.engine.main) == {"8.6"} for one in built)


def test_too_little_workspace_is_said(tiny_half_bundle: Bundle, cache: Path) -> None:
    with pytest.raises(BuildError, match="cannot compile it"):
        build_bundle(tiny_half_bundle, backend="tensorrt-rtx", options=Options(("8.9",), workspace=1024))
    assert not [path for path in cache.iterdir() if "partial" in path.name]
