"""A graph that is run in pieces gives what it gives as a whole."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from allaprima.bundle import Bundle, ExportError
from allaprima.export import segments
from allaprima.export.segments import run_graph

COMPONENTS = ("text_encoder", "denoiser", "vae_decoder")
Arrays = dict[str, NDArray[Any]]


def draw(bundle: Bundle, name: str, extents: dict[str, int]) -> Arrays:
    random = np.random.default_rng(3)
    return {
        spec.name: random.integers(0, 90, spec.resolve(extents))
        if spec.dtype == "int64"
        else random.random(spec.resolve(extents), np.float32)
        for spec in bundle.component(name).inputs
    }


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[onnx.ModelProto]:
    """The models that ONNX Runtime was given."""
    models: list[onnx.ModelProto] = []
    original = segments._open

    def note(model: onnx.ModelProto, folder: Path) -> Any:
        models.append(model)
        return original(model, folder)

    monkeypatch.setattr(segments, "_open", note)
    return models


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize(("kind", "tolerance"), [("tiny_bundle", 1e-4), ("tiny_half_bundle", 2e-2)])
def test_pieces_make_the_whole(
    request: pytest.FixtureRequest, opened: list[onnx.ModelProto], kind: str, tolerance: float, name: str
) -> None:
    """But for rounding: as a whole, values between the layers of an fp16 graph may stay in float32."""
    bundle: Bundle = request.getfixturevalue(kind)
    path = bundle.path(bundle.component(name).graph)
    extents = ({"B": 2, "G": 1, "H": 4, "W": 6, "L": 77}, {"B": 1, "G": 2, "H": 8, "W": 2, "L": 154})
    batches = [draw(bundle, name, each) for each in extents]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    files = sorted(path.parent.iterdir())
    weights = path.with_name("weights.safetensors").stat().st_size
    for segment, least, most in ((weights // 5, 5, 12), (1, 20, 1000), (2 * weights, 1, 1)):
        opened.clear()
        made = run_graph(path, batches, segment=segment)
        assert least <= len(opened) <= most
        assert sum(len(model.graph.node) for model in opened) == len(onnx.load(path).graph.node)
        for model in opened:
            size = sum(map(segments._size, model.graph.initializer))
            assert size <= segment or len(model.graph.node) == 1
        for batch, outputs in zip(batches, made, strict=True):
            assert list(outputs) == [output.name for output in session.get_outputs()]
            for got, wanted in zip(outputs.values(), session.run(None, batch), strict=True):
                assert got.dtype == wanted.dtype
                difference = np.abs(got.astype(np.float64) - wanted)
                assert difference.max() <= (2 if got.dtype == np.uint8 else tolerance * wanted.std())
    assert sorted(path.parent.iterdir()) == files


def test_bf16_is_widened_piece_by_piece(tiny_bf16_bundle: Bundle) -> None:
    """With the bundle's own file of weights, in float32 from input to output."""
    path = tiny_bf16_bundle.path("denoiser/model.onnx")
    batch = draw(tiny_bf16_bundle, "denoiser", {"B": 1, "G": 1, "H": 4, "W": 6, "L": 77})
    (whole,) = run_graph(path, [batch], widen=True)
    (pieces,) = run_graph(path, [batch], widen=True, segment=20_000)
    for name, value in whole.items():
        np.testing.assert_array_equal(pieces[name], value)
    # Rounding after every layer, as bf16 would, is not among what was computed.
    rounded = [np.unique(value.view(np.uint32) & 0xFFFF).size for value in whole.values()]
    assert max(rounded) > 10


def graph_of(folder: Path, operator: str, domain: str = "") -> Path:
    node = helper.make_node(operator, ["x"], ["y"], domain=domain)
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    weight = numpy_helper.from_array(np.ones(2, np.float32), "w")
    graph = helper.make_graph([node], "g", edges[:1], edges[1:], [weight])
    imports = [helper.make_opsetid(name, 23) for name in {"", domain}]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), folder / "model.onnx")
    return folder / "model.onnx"


def test_a_graph_that_does_not_run(tmp_path: Path) -> None:
    batch: Arrays = {"x": np.array([1, -2], np.float32)}
    (made,) = run_graph(graph_of(tmp_path, "Abs"), [batch])
    assert made["y"].tolist() == [1, 2]
    with pytest.raises(ExportError, match=r"ONNX Runtime refuses the exported graph: .*Nonsense"):
        run_graph(graph_of(tmp_path, "Nonsense", "somewhere"), [batch])
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ExportError, match=r"model\.onnx is not an ONNX file"):
        run_graph(tmp_path / "model.onnx", [batch])
