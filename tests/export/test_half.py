"""Half precision paints the pictures of fp32, as far as its rounding lets it."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
import pytest

from allaprima.bundle import Bundle, open_bundle, resolve
from allaprima.runtime import Pipeline, backends

from .test_parity import Pictures, psnr

REQUESTS = {
    "a small red circle above a blue square on a white background": "dpmpp_2m",
    "a green star": "ddim",
    "a large black ring left of an orange heart, yellow background": "euler_a",
    "two things: a pink cross and a gray triangle": "unipc",
}


def paint(pipeline: Pipeline) -> list[Pictures]:
    return [
        np.asarray(
            pipeline.generate(
                prompt, sampler=sampler, seed=seed, num_inference_steps=20, guidance_scale=3
            ).images[0]
        )
        for seed, (prompt, sampler) in enumerate(REQUESTS.items())
    ]


@pytest.fixture(scope="module")
def wanted(shapes_bundle: Bundle) -> Iterator[list[Pictures]]:
    with Pipeline.open(shapes_bundle.folder, backend="ort") as pipeline:
        assert pipeline.precision == "fp32"
        yield paint(pipeline)


@pytest.mark.parametrize(("backend", "precision"), [("ort", "fp16"), ("openvino", "bf16")])
def test_half_precision(wanted: list[Pictures], backend: str, precision: str) -> None:
    """The built-in bundle, whose weights are fp16; 45 dB was the least of 40 pictures in bf16, 71 in fp16."""
    able = next(info.precisions for info in backends() if info.name == backend)
    if precision not in able:
        pytest.skip(f"{backend} has no {precision} here")
    with Pipeline.open(resolve("shapes"), backend=backend, precision=precision) as pipeline:
        assert pipeline.precision == precision
        found = [psnr(*pair) for pair in zip(paint(pipeline), wanted, strict=True)]
    assert min(found) >= 35, found
    assert np.median(found) < 90  # not fp32 itself


def test_onnxruntime_computes_weights_of_fp16_in_fp32(wanted: list[Pictures]) -> None:
    """It has few kernels for fp16, so that is what it does unless told otherwise, and OpenVINO if it is."""
    with Pipeline.open(resolve("shapes"), backend="openvino", precision="fp32") as pipeline:
        found = [psnr(*pair) for pair in zip(paint(pipeline), wanted, strict=True)]
    assert min(found) >= 70, found


@pytest.mark.parametrize("role", open_bundle(resolve("shapes")).manifest.components)
def test_the_graph_in_float32_takes_the_same_weights(role: str) -> None:
    bundle = open_bundle(resolve("shapes"))
    component = bundle.component(role)
    assert component.float32_graph == f"{role}/float32.onnx"
    path = bundle.path(component.float32_graph)
    model = onnx.load(str(path), load_external_data=False)
    types = Counter(each.data_type for each in model.graph.initializer)
    assert types[onnx.TensorProto.FLOAT16] > 10
    places = {each.value for tensor in model.graph.initializer for each in tensor.external_data}
    assert "weights.safetensors" in places
    assert path.stat().st_size < 1.3 * bundle.path(component.graph).stat().st_size
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert {node.attribute[0].i for node in casts} & {onnx.TensorProto.FLOAT16} == set()
