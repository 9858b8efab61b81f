"""One suite for every session: a fake, ONNX Runtime, OpenVINO."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray

from allaprima.bundle import BackendError, Component, EngineFile, TensorSpec
from allaprima.runtime import Session, backends, choose, decide, open_session
from allaprima.runtime.backends import BackendInfo, engine_precision
from allaprima.runtime.memory import on_host
from allaprima.runtime.sessions.fake import NumpySession
from allaprima.runtime.sessions.openvino import compile_graph

# y = x * gain[:, None] for each of G repetitions, z = the number of ids that are positive
GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
small (float[B, C] x, float[B] gain, int64[N] ids) => (float[TwoB, C] y, uint8[N] z) <int64 zero = {0}> {
    axis = Constant <value_ints = [1]> ()
    column = Unsqueeze (gain, axis)
    product = Mul (x, column)
    y = Concat <axis = 0> (product, product)
    positive = Greater (ids, zero)
    z = Cast <to = 2> (positive)
}
"""
INPUTS = (
    TensorSpec("x", "float32", ("B", "C")),
    TensorSpec("gain", "float32", ("B",)),
    TensorSpec("ids", "int64", ("N",)),
)
OUTPUTS = (TensorSpec("y", "float32", ("2*B", "C")), TensorSpec("z", "uint8", ("N",)))
COMPONENT = Component("small.onnx", "fp32", INPUTS, OUTPUTS, ())

Buffers = dict[str, NDArray[Any]]


def compute(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    product = inputs["x"] * inputs["gain"][:, None]
    return {"y": np.concatenate([product, product]), "z": (inputs["ids"] > 0).astype(np.uint8)}


def make_buffers(lanes: int = 2, channels: int = 3, count: int = 5) -> Buffers:
    generator = np.random.default_rng(lanes)
    return {
        "x": generator.normal(size=(lanes, channels)).astype(np.float32),
        "gain": generator.normal(size=lanes).astype(np.float32),
        "ids": generator.integers(-5, 5, count),
        "y": np.full((2 * lanes, channels), np.nan, np.float32),
        "z": np.full(count, 77, np.uint8),
    }


def is_right(buffers: Buffers) -> bool:
    return all(np.array_equal(buffers[name], value) for name, value in compute(buffers).items())


def write_graph(folder: Path, text: str = GRAPH) -> Path:
    path = folder / "small.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.fixture(params=["fake", "ort", "openvino"])
def session(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Session]:
    if request.param == "fake":
        opened: Session = NumpySession(INPUTS, OUTPUTS, compute)
    else:
        pytest.importorskip({"ort": "onnxruntime"}.get(request.param, request.param))
        opened = open_session(write_graph(tmp_path), COMPONENT, request.param, precision="fp32", threads=1)
    yield opened
    opened.close()


def test_specs(session: Session) -> None:
    assert dict(session.inputs) == {spec.name: spec for spec in INPUTS}
    assert dict(session.outputs) == {spec.name: spec for spec in OUTPUTS}
    assert session.precision == "fp32"


def test_runs_in_place_and_reads_the_present_inputs(session: Session) -> None:
    buffers = make_buffers()
    binding = session.bind(on_host(buffers))
    binding.run()
    assert is_right(buffers)
    before = buffers["y"].copy()
    buffers["x"] += 1
    buffers["ids"][:] = 1
    binding.run()
    assert is_right(buffers)
    assert not np.array_equal(before, buffers["y"])


def test_bindings_of_several_shapes_coexist(session: Session) -> None:
    many = [
        make_buffers(lanes, channels, count) for lanes, channels, count in [(1, 4, 1), (3, 2, 7), (2, 5, 2)]
    ]
    bindings = [session.bind(on_host(buffers)) for buffers in many]
    for _ in range(2):
        for buffers, binding in zip(many, bindings, strict=True):
            buffers["gain"] *= -2
            binding.run()
        assert all(map(is_right, many))


def test_ping_pong(session: Session) -> None:
    """Two bindings over the same arrays: what one writes, the other reads."""
    pair = np.ones((2, 2, 3), np.float32)
    rest = make_buffers()
    start = {**rest, "x": pair[0], "y": np.zeros((4, 3), np.float32)}
    first = session.bind(on_host(start))
    again = {**rest, "x": start["y"][:2], "y": np.zeros((4, 3), np.float32)}
    second = session.bind(on_host(again))
    first.run()
    second.run()
    np.testing.assert_allclose(again["y"][2:], pair[0] * rest["gain"][:, None] ** 2, rtol=1e-6)


def test_binding_keeps_its_arrays_alive(session: Session) -> None:
    buffers = make_buffers()
    binding = session.bind(on_host(dict(buffers)))
    y = buffers["y"]
    wanted = compute(buffers)["y"]
    buffers.clear()
    session.close()
    [np.full(1000, 9.0) for _ in range(100)]  # whatever was freed is used again
    binding.run()
    assert np.array_equal(y, wanted)


def test_slices_of_a_larger_array(session: Session) -> None:
    buffers = make_buffers()
    whole = np.zeros((9, 3), np.float32)
    buffers["y"] = whole[3:7]
    session.bind(on_host(buffers)).run()
    assert is_right(buffers)
    assert not whole[:3].any()
    assert not whole[7:].any()


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("gain", None, "missing: gain"),
        ("y", None, "missing: y"),
        ("more", np.zeros(1), "unknown: more"),
        ("x", np.zeros((2, 3)), r"'x' should be float32 \[B, C\], not float64 \[2, 3\]"),
        ("z", np.zeros(5, np.int8), r"'z' should be uint8 \[N\], not int8 \[5\]"),
        ("x", np.zeros(2, np.float32), r"'x' should be float32 \[B, C\], not float32 \[2\]"),
        ("gain", np.zeros(3, np.float32), r"'gain' should be float32 \[B\] with B = 2, not float32 \[3\]"),
        ("y", np.zeros((2, 3), np.float32), r"'y' should be float32 \[2\*B, C\] with B = 2, C = 3, not"),
        ("y", np.zeros((5, 3), np.float32), r"'y' should be float32 \[2\*B, C\] with B = 2, C = 3, not"),
        ("y", np.zeros((3, 4), np.float32).T, "'y' is not C-contiguous"),
        ("y", read_only(np.zeros((4, 3), np.float32)), "'y' is read-only"),
    ],
)
def test_wrong_buffers(session: Session, name: str, array: NDArray[Any] | None, message: str) -> None:
    buffers = make_buffers()
    if array is None:
        del buffers[name]
    else:
        buffers[name] = array
    with pytest.raises(BackendError, match=message):
        session.bind(on_host(buffers))


def test_overlap(session: Session) -> None:
    buffers = make_buffers()
    buffers["x"] = buffers["y"][1:3]
    with pytest.raises(BackendError, match="output 'y' overlaps 'x'"):
        session.bind(on_host(buffers))


def test_unloaded(session: Session) -> None:
    """Old bindings go on, new ones load again."""
    before, after = make_buffers(), make_buffers(3, 4, 5)
    binding = session.bind(on_host(before))
    session.unload()
    session.unload()
    binding.run()
    session.bind(on_host(after)).run()
    assert is_right(before)
    assert is_right(after)
    session.close()
    session.unload()
    with pytest.raises(BackendError, match="closed"):
        session.bind(on_host(make_buffers()))


def test_closed(session: Session) -> None:
    session.close()
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session.bind(on_host(make_buffers()))


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_graph_that_is_not_the_manifests(backend: str, tmp_path: Path) -> None:
    path = write_graph(tmp_path, GRAPH.replace("gain", "loss"))
    with pytest.raises(BackendError, match="disagree, tensors missing: gain; unknown: loss"):
        open_session(path, COMPONENT, backend, threads=1)
    path.write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"cannot load .*small\.onnx"):
        open_session(path, COMPONENT, backend, threads=1)


@pytest.mark.parametrize("backend", ["ort", "fake"])
def test_failure_while_running(backend: str, tmp_path: Path) -> None:
    """A manifest that is wrong about a shape is found out when the graph runs."""
    outputs = (TensorSpec("y", "float32", ("any", "C")), OUTPUTS[1])
    component = Component("small.onnx", "fp32", INPUTS, outputs, ())
    fake = NumpySession(INPUTS, outputs, compute)
    opened = fake if backend == "fake" else open_session(write_graph(tmp_path), component, backend)
    binding = opened.bind(on_host(make_buffers() | {"y": np.zeros((3, 3), np.float32)}))
    with pytest.raises(BackendError, match="failed"):
        binding.run()


def test_precision_of_ort(tmp_path: Path) -> None:
    path = write_graph(tmp_path)
    with pytest.raises(BackendError, match=r"in fp32 on a CPU, not in bf16: use .* openvino$"):
        open_session(path, COMPONENT, "ort", precision="bf16")
    with pytest.raises(BackendError, match="backend openvino, or export with --precision fp16"):
        open_session(path, Component("small.onnx", "bf16", INPUTS, OUTPUTS, ()), "ort")


@pytest.mark.parametrize("stored", ["fp16", "bf16"])
def test_ort_takes_the_graph_in_float32(tmp_path: Path, stored: str) -> None:
    path = write_graph(tmp_path)
    path.rename(tmp_path / "wide.onnx")
    component = Component("small.onnx", stored, INPUTS, OUTPUTS, (), float32_graph="wide.onnx")
    for precision in (None, "auto", "fp32"):
        opened = open_session(path, component, "ort", precision=precision)
        assert opened.precision == "fp32"
        buffers = make_buffers()
        opened.bind(on_host(buffers)).run()
        assert is_right(buffers)
    opened = open_session(path, replace(component, precision="fp32"), "ort")  # ... also where it is not wider
    opened.bind(on_host(make_buffers())).run()
    refused = {"fp16": "cannot load .*small.onnx", "bf16": "in fp32 on a CPU, not in bf16"}[stored]
    with pytest.raises(BackendError, match=refused):
        open_session(path, component, "ort", precision=stored)
    overflows = replace(component, precision="bf16", overflows_fp16=True)
    assert open_session(path, overflows, "ort", precision="fp16").precision == "fp32"


@pytest.mark.parametrize(
    ("stored", "able", "converts", "chosen"),
    [
        ("bf16", ("bf16", "fp32", "fp16"), True, "bf16"),
        ("bf16", ("fp32", "fp16"), True, "fp32"),
        ("bf16", ("fp32",), True, "fp32"),
        ("fp32", ("bf16", "fp32", "fp16"), True, "fp32"),
        ("bf16", ("fp16", "bf16"), False, "bf16"),
        ("bf16", ("fp32", "fp16"), False, "fp32"),
        ("bf16", ("fp16",), False, "bf16"),  # none will do, and the session says so
    ],
)
def test_what_overflows_is_not_computed_in_fp16(
    monkeypatch: pytest.MonkeyPatch, stored: str, able: tuple[str, ...], converts: bool, chosen: str
) -> None:
    """Asked for fp16, on processors that have bf16 and on those that have not."""
    info = BackendInfo("openvino", True, precisions=able, converts=converts)
    monkeypatch.setattr(sys.modules["allaprima.runtime.backends"], "_probe", lambda _: info)
    component = Component("a.onnx", stored, INPUTS, OUTPUTS, (), True, float32_graph="float32.onnx")
    assert engine_precision(component, "openvino", "fp16") == chosen
    assert engine_precision(replace(component, overflows_fp16=False), "openvino", "fp16") == "fp16"


def test_engine_of_openvino(tmp_path: Path) -> None:
    """A compiled model that was exported is loaded without the graph."""
    engine = tmp_path / "small.blob"
    compiled = compile_graph(write_graph(tmp_path), COMPONENT, precision="fp32", threads=1)
    engine.write_bytes(compiled.export_model().getvalue())
    opened = open_session(
        tmp_path / "gone.onnx",
        COMPONENT,
        "openvino",
        precision="fp32",
        threads=1,
        engines=[EngineFile(engine)],
    )
    buffers = make_buffers()
    opened.bind(on_host(buffers)).run()
    assert is_right(buffers)


@pytest.mark.parametrize("stored", ["fp16", "bf16"])
def test_openvino_keeps_half_precision_in_its_file(stored: str, tmp_path: Path) -> None:
    """What is stored in half precision is computed in fp32 where that is asked for, and no constant grows."""
    kind = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[stored]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    weights = np.random.default_rng(0).normal(size=(512, 512)).astype(dtype)
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
    product (float[B, 512] x) => (float[B, 512] y) {{
        rounded = Cast <to = {kind}> (x)
        product = MatMul (rounded, weights)
        y = Cast <to = 1> (product)
    }}
    """
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "weights"))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    specs = TensorSpec("x", "float32", ("B", 512)), TensorSpec("y", "float32", ("B", 512))
    component = Component("model.onnx", stored, specs[:1], specs[1:], ())
    opened = open_session(path, component, "openvino", precision="fp32", threads=1)
    x, y = np.random.default_rng(1).normal(size=(3, 512)).astype(np.float32), np.zeros((3, 512), np.float32)
    opened.bind(on_host({"x": x, "y": y})).run()
    np.testing.assert_allclose(y, x @ weights.astype(np.float32), atol=1e-3)
    compiled = compile_graph(path, component, precision="fp32", threads=1)
    assert len(compiled.export_model().getvalue()) < 1.2 * weights.nbytes


def test_openvino_keeps_phases_exact(tmp_path: Path) -> None:
    """In bf16, cos(timestep * frequency) would otherwise be of a timestep rounded to 8 bits."""
    info = {info.name: info for info in backends()}["openvino"]
    if "bf16" not in info.precisions:
        pytest.skip("this CPU has no bf16")
    text = """<ir_version: 10, opset_import: ["" : 23]>
    wave (float[B] timestep) => (float[B, 4] y)
    <float[4] frequencies = {1, 0.1, 0.01, 0.001}, float[4, 4] unit = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}> {
        axis = Constant <value_ints = [1]> ()
        column = Unsqueeze (timestep, axis)
        phase = Mul (column, frequencies)
        wave = Cos (phase)
        y = MatMul (wave, unit)
    }
    """
    specs = (TensorSpec("timestep", "float32", ("B",)),), (TensorSpec("y", "float32", ("B", 4)),)
    component = Component("small.onnx", "fp32", *specs, ())
    opened = open_session(write_graph(tmp_path, text), component, "openvino", precision="bf16", threads=1)
    timestep, y = np.array([981.0, 917.37], np.float32), np.zeros((2, 4), np.float32)
    opened.bind(on_host({"timestep": timestep, "y": y})).run()
    wanted = np.cos(timestep[:, None] * np.array([1, 0.1, 0.01, 0.001]))
    np.testing.assert_allclose(y, wanted, atol=5e-3)


def test_backends() -> None:
    infos = {info.name: info for info in backends()}
    assert list(infos) == [
        "tensorrt",
        "tensorrt-rtx",
        "ort-cuda",
        "openvino",
        "ort",
        "ort-tensorrt",
        "ort-tensorrt-rtx",
    ]
    assert infos["openvino"].available
    assert infos["ort"].available
    for name, info in infos.items():
        if info.available:
            assert info.version
            assert "fp32" in info.precisions
            assert choose(name) == name
    assert infos[choose()].available


def test_decision() -> None:
    """What "auto" takes, and why nothing faster."""
    decision = decide()
    infos = {info.name: info for info in backends()}
    faster = list(infos)[: list(infos).index(decision.backend)]
    assert [name for name, _ in decision.passed] == faster
    assert all(reason for _, reason in decision.passed)
    if not infos["ort-cuda"].available:
        assert decision.backend == "openvino"


def test_absent_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert choose() == "ort"
    with pytest.raises(BackendError, match=r'pip install "allaprima\[openvino\]"'):
        choose("openvino")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"no backend works here: .*openvino.* or .*ort"):
        choose()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, "unknown backend 'cuda': choose from auto, tensorrt, .*, openvino, ort, ort-"),
        ({"precision": "int4"}, "unknown precision 'int4'"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=message):
        open_session(tmp_path / "small.onnx", COMPONENT, **options)
