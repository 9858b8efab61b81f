"""What is reckoned for a memory limit."""

from pathlib import Path

import numpy as np
import pytest

from allaprima.bundle import BackendError, Component, EngineFile, TensorSpec
from allaprima.runtime.backends import footprint
from allaprima.runtime.footprint import Footprint, activations, parse_bytes, show_bytes, stored
from allaprima.runtime.memory import on_host


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (123, 123),
        ("123", 123),
        ("0", 0),
        ("8GB", 8 * 10**9),
        (" 1.5 gib ", 3 << 29),
        ("2KiB", 2048),
        ("7b", 7),
    ],
)
def test_bytes_are_read(text: int | str, count: int) -> None:
    assert parse_bytes("memory_limit", text) == count


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1000, "1.0 kB"), (1_510_001, "1.6 MB"), (65 * 10**9, "65.0 GB")]
)
def test_bytes_are_shown_so_that_they_are_enough(count: int, text: str) -> None:
    assert show_bytes(count) == text
    assert parse_bytes("shown", text) >= count


@pytest.mark.parametrize("text", ["eight", "8 gigabytes", "-8GB", "8GB 1MB", None, 2.0])
def test_what_is_no_number_of_bytes(text: object) -> None:
    with pytest.raises(BackendError, match="memory_limit is "):
        parse_bytes("memory_limit", text)  # type: ignore[arg-type]


def test_graphs_share_weights(tmp_path: Path) -> None:
    """Those beside a graph hold none; what it uses of another's weights is known from the manifest."""
    for name, size in (("model.onnx", 10), ("float32.onnx", 7), ("weights.safetensors", 100), ("x.data", 5)):
        (tmp_path / name).write_bytes(bytes(size))
    component = Component("a/float32.onnx", "fp16", (), (), (), weight_bytes=30)
    assert stored(tmp_path / "model.onnx") == 115
    assert stored(tmp_path / "float32.onnx", component) == 37


def test_activations_grow_with_the_picture_and_the_batch() -> None:
    def denoiser(lanes: int, branches: int, side: int, precision: str = "fp32") -> int:
        sample = np.zeros((lanes, 4, side, side), np.float32)
        guidance = np.zeros((branches, lanes), np.float32)
        return activations(on_host({"sample": sample, "guidance": guidance}), precision)

    def decoder(side: int) -> int:
        return activations(on_host({"image": np.zeros((1, side, side, 3), np.uint8)}), "fp32")

    assert denoiser(2, 2, 8) == pytest.approx(4 * denoiser(1, 1, 8), rel=1e-3)
    assert denoiser(1, 1, 16) == pytest.approx(4 * denoiser(1, 1, 8), rel=1e-3)
    assert denoiser(1, 1, 8, "bf16") < denoiser(1, 1, 8)
    assert decoder(512) == 4 * decoder(256)
    assert activations(on_host({"ids": np.zeros((2, 77), np.int64)}), "fp32") == 2 * 77 * 8


@pytest.mark.parametrize(
    ("backend", "precision", "times"),
    [("openvino", "fp32", 2), ("openvino", "fp16", 3), ("ort", "fp32", 1), ("ort", "fp16", 3)],
)
def test_weights(tmp_path: Path, backend: str, precision: str, times: int) -> None:
    """All files beside the graph count, and a copy of what is widened to fp32."""
    for name, size in (("model.onnx", 100), ("model.data", 900)):
        (tmp_path / name).write_bytes(bytes(size))
    component = Component("denoiser/model.onnx", precision, (), (), ())
    wanted = Footprint(times * 1000, times * 1000)
    computed = "fp32" if backend == "openvino" else None
    assert footprint(tmp_path / "model.onnx", component, backend, precision=computed) == wanted


@pytest.mark.parametrize(
    ("precision", "overflowing", "asked", "times"),
    [
        *(("fp16", None, None, 3), ("fp16", None, "fp16", 3), ("bf16", None, None, 3)),
        *(("bf16", "image", None, 3), ("bf16", "input_ids", None, 1)),
    ],
)
def test_weights_that_a_graph_in_float32_widens(
    tmp_path: Path, precision: str, overflowing: str | None, asked: str | None, times: int
) -> None:
    """Once, as it is loaded, but for the large text encoders that overflow: there each run does."""
    inputs = (TensorSpec(overflowing or "input_ids", "float32", ("B",)),)
    (tmp_path / "weights.safetensors").write_bytes(bytes(1000))
    graph = tmp_path / "model.onnx"
    component = Component(
        "a/model.onnx", precision, inputs, (), (), overflowing is not None, float32_graph="a/float32.onnx"
    )
    wanted = Footprint(times * 1000, times * 1000)
    assert footprint(graph, component, "ort", precision=asked) == wanted
    (tmp_path / "engine").mkdir()
    engine = tmp_path / "engine" / "model.onnx"
    engine.write_bytes(bytes(500))
    of_engine = footprint(graph, component, "ort", [EngineFile(engine)], precision=asked)
    assert of_engine.weights == (1500 if asked == "fp16" else 500), "it holds what is computed in"


def test_weights_of_an_engine(tmp_path: Path) -> None:
    engine = tmp_path / "model.blob"
    engine.write_bytes(bytes(500))
    component = Component("denoiser/model.onnx", "fp16", (), (), ())
    path, engines = tmp_path / "gone" / "model.onnx", [EngineFile(engine)]
    assert footprint(path, component, "openvino", engines, precision="fp32") == Footprint(1500, 1500)
