"""A quantized bundle of a real model: what it paints, what it says of itself, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import allaprima.engine.quantize
from allaprima.benchmarks.likeness import psnr
from allaprima.bundle import (
    BackendError,
    Bundle,
    BundleError,
    BundleWriter,
    RequestError,
    find_engine,
    open_bundle,
    resolve,
)
from allaprima.engine import Options, build_bundle, compilers
from allaprima.engine.calibration import Calibration
from allaprima.engine.layers import SENSITIVE
from allaprima.engine.quantize import Progress, quantize_bundle
from allaprima.engine.sensitivity import keep_best
from allaprima.runtime import Pipeline, backends

AVAILABLE = [info.name for info in backends() if info.available and info.name in ("openvino", "ort")]
PROMPTS = ("a red circle on a white background", "a blue square left of a green triangle")
PROMPT = "a yellow circle above a purple square"
CALIBRATION = Calibration(PROMPTS, samples=2, steps=6, guidance_scale=2.0)

pytestmark = pytest.mark.skipif("openvino" not in AVAILABLE, reason="openvino is not installed")


@pytest.fixture(scope="session")
def source() -> Bundle:
    return open_bundle(resolve("shapes"))


@pytest.fixture(scope="session")
def stages() -> list[Progress]:
    return []


@pytest.fixture(scope="session")
def quantized(source: Bundle, stages: list[Progress], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = tmp_path_factory.mktemp("quantized") / "shapes-int8"
    return quantize_bundle(source, target, CALIBRATION, backend="openvino", threads=1, progress=stages.append)


def paint(bundle: Bundle, backend: str, precision: str | None = None) -> tuple[np.ndarray, Any]:
    with Pipeline.open(bundle.folder, backend=backend, precision=precision, threads=1) as pipeline:
        result = pipeline.generate(PROMPT, num_inference_steps=8, guidance_scale=2.0, seed=3)
    return np.asarray(result.images[0]), result.parameters[0]


@pytest.mark.parametrize("backend", AVAILABLE)
def test_pictures_are_close_to_those_in_float(source: Bundle, quantized: Bundle, backend: str) -> None:
    """And not the same: the arithmetic is another one."""
    precision = "fp32" if backend == "openvino" else "fp16"
    plain, before = paint(source, backend, precision)
    picture, after = paint(quantized, backend, precision)
    assert 24 < psnr(plain, picture) < 60
    assert after.precision == f"int8+{before.precision}"


@pytest.mark.skipif(len(AVAILABLE) < 2, reason="needs both backends")
def test_backends_agree(quantized: Bundle) -> None:
    """Far more than with the pictures in float: a value near the middle of a step falls to either side."""
    assert psnr(paint(quantized, "openvino", "fp32")[0], paint(quantized, "ort")[0]) > 30


def test_the_manifest_says_it(source: Bundle, quantized: Bundle, stages: list[Progress]) -> None:
    component = quantized.component("denoiser")
    made = component.quantization
    assert made is not None
    assert (made.dtype, component.weights, component.parity) == ("int8", "int8", ())
    assert (made.samples, made.steps, made.held_out) == (2, 6, 6)
    assert 0.7 * made.total < made.layers < made.total
    assert 0.005 < made.error < 0.2
    assert (quantized.manifest.name, component.precision) == ("shapes-int8", "fp16")
    assert open_bundle(quantized.folder, verify=True).manifest == quantized.manifest
    before, after = source.manifest, quantized.manifest
    others = {name: each for name, each in before.components.items() if name != "denoiser"}
    assert {name: each for name, each in after.components.items() if name != "denoiser"} == others
    assert before.files.keys() ^ after.files.keys() == {"denoiser/float32.onnx"}
    same = {name for name in after.files if before.files[name] == after.files[name]}
    assert after.files.keys() - same == {"denoiser/model.onnx", "denoiser/weights.safetensors"}
    assert (
        after.files["denoiser/weights.safetensors"].size
        < 0.62 * before.files["denoiser/weights.safetensors"].size
    )
    assert [stage.done for stage in stages] == list(range(5))
    assert {stage.total for stage in stages} == {5}


def test_a_manifest_without_it_says_nothing_of_it(source: Bundle) -> None:
    assert "quantization" not in json.dumps(source.manifest.to_json())


def test_the_graph_is_portable(quantized: Bundle) -> None:
    """Standard operators of opset 23, symmetric, and the sensitive layers in float."""
    path = quantized.path("denoiser/model.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 23)]
    assert {node.domain for node in model.graph.node} == {""}
    kinds = {each.name: each.data_type for each in model.graph.initializer}
    narrow = {name for name, kind in kinds.items() if kind == onnx.TensorProto.INT8}
    zero = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert len(zero) == 1
    assert not any(part in SENSITIVE for name in narrow for part in name.split("."))
    made = quantized.component("denoiser").quantization
    assert made is not None
    assert len(narrow - zero) == made.layers
    known = {name for node in model.graph.node for name in node.output} | kinds.keys()
    said = {info.name: info.type.tensor_type.elem_type for info in model.graph.value_info}
    assert said.keys() <= known
    assert all(kinds.get(name, kind) == kind for name, kind in said.items())


def test_the_source_is_left_alone(source: Bundle, quantized: Bundle) -> None:
    open_bundle(source.folder, verify=True)
    assert not [path.name for path in quantized.folder.parent.iterdir() if path != quantized.folder]
    assert not list(quantized.folder.rglob("*gauged*"))
    assert quantized.component("denoiser").float32_graph is None
    assert [path.parent.name for path in sorted(quantized.folder.rglob("float32.onnx"))] == [
        *("text_encoder", "vae_decoder", "vae_encoder")
    ], "that of the denoiser would not be quantized"


def test_what_is_not_written_to_is_linked(
    source: Bundle, quantized: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk can; else it is copied."""
    first = tmp_path / "first"
    allaprima.engine.quantize._take_over(source, first)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(allaprima.engine.quantize.os, "link", refuse)
    allaprima.engine.quantize._take_over(source, tmp_path / "second")
    for name in source.manifest.files:
        copy = tmp_path / "second" / name
        assert copy.read_bytes() == (first / name).read_bytes() == source.path(name).read_bytes()
        assert not copy.samefile(source.path(name))


def test_it_is_not_quantized_twice(quantized: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="quantized already: take the bundle that it was made of"):
        quantize_bundle(quantized, tmp_path / "again", CALIBRATION)
    assert not list(tmp_path.iterdir())


def test_a_cached_step_would_still_compute_in_float(source: Bundle, tmp_path: Path) -> None:
    components = dict(source.manifest.components)
    components["denoiser_deep"] = replace(components["denoiser"], graph="denoiser/deep.onnx")
    cached = Bundle(source.folder, replace(source.manifest, components=components))
    with pytest.raises(BundleError, match=r"denoiser_deep share the denoiser's weights.*--step-cache"):
        quantize_bundle(cached, tmp_path / "made", CALIBRATION)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompts": ()}, "there are no prompts"),
        ({"prompts": PROMPTS, "samples": 0}, "samples is 0"),
    ],
)
def test_bad_calibrations(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Calibration(**fields)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"steps": 0}, RequestError, "num_inference_steps"),
        ({"height": 100, "width": 128}, RequestError, "100"),
    ],
)
def test_what_cannot_be_painted(
    source: Bundle, tmp_path: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        quantize_bundle(source, tmp_path / "made", replace(CALIBRATION, **change), threads=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["tensorrt", "nonsense"])
def test_backends_that_cannot_calibrate(source: Bundle, tmp_path: Path, backend: str) -> None:
    with pytest.raises(BackendError, match=f"{backend} cannot calibrate: choose from auto, openvino, ort"):
        quantize_bundle(source, tmp_path / "made", CALIBRATION, backend=backend)


def test_an_interrupted_run_leaves_nothing(source: Bundle, tmp_path: Path) -> None:
    """Nor does it touch what is there already."""
    target = tmp_path / "made"

    def stop(progress: Progress) -> None:
        assert any(path.name.startswith(".made") for path in tmp_path.iterdir())
        if progress.stage.startswith("painting 2"):
            raise KeyboardInterrupt

    short = replace(CALIBRATION, steps=1)
    with pytest.raises(KeyboardInterrupt):
        quantize_bundle(source, target, short, threads=1, progress=stop)
    assert not list(tmp_path.iterdir())
    with BundleWriter(target) as writer:
        allaprima.engine.quantize._take_over(source, writer.folder)
        writer.commit(source.manifest)
    with pytest.raises(BundleError, match="exists already"):
        quantize_bundle(source, target, short, threads=1, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_bundle(source, target, short, threads=1, overwrite=True, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert open_bundle(target, verify=True).manifest == source.manifest


def test_a_result_that_is_no_good_is_refused(
    source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allaprima.engine.quantize, "WORST", 1e-6)
    with pytest.raises(
        BackendError, match=r"off by 0\.\d\d standard deviations.*calibrate with more samples"
    ):
        quantize_bundle(source, tmp_path / "made", replace(CALIBRATION, samples=1, steps=1), threads=1)
    assert not list(tmp_path.iterdir())


def test_layers_that_lose_too_much_stay_in_float(
    source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, where nothing is little enough: the graph then predicts what it predicted before."""
    monkeypatch.setattr(allaprima.engine.quantize, "LIMIT", 0.0)
    made = quantize_bundle(
        source, tmp_path / "made", replace(CALIBRATION, samples=1, steps=2), threads=1
    ).component("denoiser")
    assert made.quantization is not None
    assert made.quantization.layers == 0
    assert made.quantization.error < 1e-3


def test_the_costly_layers_stay_in_float(source: Bundle, quantized: Bundle, tmp_path: Path) -> None:
    """A few of them cost most of the error: those of the last resolution, in this model."""
    stages: list[Progress] = []
    calibration = replace(CALIBRATION, samples=1, steps=2)
    made = quantize_bundle(
        source, tmp_path / "made", calibration, most=0.03, threads=1, progress=stages.append
    ).component("denoiser")
    plain = quantized.component("denoiser").quantization
    assert plain is not None
    assert made.quantization is not None
    assert made.quantization.error < 0.04 < plain.error
    assert 0.6 * plain.layers < made.quantization.layers < plain.layers
    assert [stage.done for stage in stages] == list(range(stages[-1].total))
    assert {path.name for path in (tmp_path / "made" / "denoiser").iterdir()} == {
        "model.onnx",
        "weights.safetensors",
    }


def test_the_worst_are_left_out() -> None:
    plan: Any = ["a", "b", "c", "d"]
    errors = [0.03, 0.2, 0.04, 0.0]
    assert keep_best(plan, errors, 1.0) == plan
    assert keep_best(plan, errors, 0.05) == ["a", "c", "d"]
    assert keep_best(plan, errors, 0.049) == ["a", "d"]
    assert keep_best(plan, errors, 1e-9) == ["d"]


@pytest.mark.parametrize("most", [0.0, -1.0, float("nan")])
def test_a_bad_largest_error(source: Bundle, tmp_path: Path, most: float) -> None:
    with pytest.raises(RequestError, match=f"the largest error is {most}"):
        quantize_bundle(source, tmp_path / "made", CALIBRATION, most=most)


def test_tensorrt_rtx_compiles_it(quantized: Bundle, cache: Path) -> None:
    """Without a GPU: its parser and its builder take the graph, for a device that is not here."""
    if not any(info.name == "tensorrt-rtx" and info.available for info in compilers()):
        pytest.skip("tensorrt-rtx is not installed")
    (built,) = build_bundle(
        quantized,
        backend="tensorrt-rtx",
        components=("denoiser",),
        options=Options(targets=("8.9",)),
    )
    assert (built.component, built.engine.key.precision) == ("denoiser", "fp16")
    assert find_engine(built.engine.key) == built.folder / built.engine.main


@pytest.mark.skipif("ort" not in AVAILABLE, reason="onnxruntime is not installed")
def test_ranges_may_be_those_of_another_backend(source: Bundle, tmp_path: Path, quantized: Bundle) -> None:
    other = quantize_bundle(source, tmp_path / "made", CALIBRATION, backend="ort", threads=1)
    one, two = (each.component("denoiser").quantization for each in (quantized, other))
    assert one is not None
    assert two is not None
    assert one.layers == two.layers
    assert two.error == pytest.approx(one.error, rel=0.2)
