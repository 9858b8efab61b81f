"""What only an NVIDIA GPU can tell. `make test-gpu` runs these; elsewhere they skip and say so."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from allaprima.bundle import BackendError, Bundle, open_bundle, resolve
from allaprima.engine import build_bundle, parse_sizes
from allaprima.engine.verify import draw_inputs
from allaprima.runtime import Pipeline, Request, backends
from allaprima.runtime.cuda import CudaMemory, Gpu, default_gpu
from allaprima.runtime.sessions.ort import open_graph, session_options
from allaprima.runtime.sessions.ort_cuda import CUDA, OrtCudaSession, OrtGpuDriver

pytestmark = pytest.mark.gpu

PROMPT = "a red circle above a blue square on a white background"
SIZES = "128x128,192x128"
GPU_BACKENDS = ("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-tensorrt", "ort-tensorrt-rtx")


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Gpu:
    try:
        return default_gpu()
    except BackendError as cause:
        pytest.skip(str(cause))


@pytest.fixture(params=GPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that works here."""
    name = str(request.param)
    info = next(info for info in backends() if info.name == name)
    if not info.available:
        pytest.skip(f"{name}: {info.reason}")
    return name


def open_built(bundle: Bundle, backend: str) -> Pipeline:
    """With engines for two sizes and up to three pictures, if the backend wants them built."""
    if backend in ("tensorrt", "tensorrt-rtx"):
        build_bundle(bundle, backend=backend, sizes=parse_sizes(SIZES), batch=(1, 3))
    return Pipeline.open(bundle.folder, backend=backend)


@pytest.fixture
def shapes() -> Bundle:
    return open_bundle(resolve("shapes"))


REQUESTS: list[dict[str, Any]] = [
    {"sampler": "ddim", "num_inference_steps": 20},
    {"sampler": "euler_a", "num_inference_steps": 8, "num_images": 3},
    {"sampler": "dpmpp_2m", "num_inference_steps": 10, "width": 192, "guidance_scale": 1.0},
    {"sampler": "ddpm", "num_inference_steps": 12, "width": 192},
]


def psnr(one: NDArray[np.uint8], two: NDArray[np.uint8]) -> float:
    error = np.square(one.astype(np.float64) - two).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def pictures(result: Any) -> list[NDArray[np.uint8]]:
    return [np.asarray(image) for image in result.images]


def forbid_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's are captured by us, ONNX Runtime's by itself."""
    monkeypatch.setattr(Gpu, "capture", lambda self, work: None)
    opens = OrtGpuDriver.open_graph

    def refuse(self: OrtGpuDriver, *given: Any, graphs: bool) -> Any:
        if graphs:
            raise BackendError("not in this test")
        return opens(self, *given, graphs=False)

    monkeypatch.setattr(OrtGpuDriver, "open_graph", refuse)


def obstacle(pipeline: Pipeline) -> str:
    """Why steps run without CUDA graphs; "" if they do not."""
    session = pipeline._components.sessions["denoiser"]
    return session.obstacle if isinstance(session, OrtCudaSession) else ""


@pytest.mark.parametrize("graphs", [True, False])
def test_same_pictures_as_on_the_cpu(
    bundle: Bundle, backend: str, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes change back and forth. Both compute in float16; a chain of steps makes small errors larger."""
    if not graphs:
        forbid_graphs(monkeypatch)
    with (
        open_built(bundle, backend) as pipeline,
        Pipeline.open(bundle.folder, backend="ort") as reference,
    ):
        for request in REQUESTS * 2:
            got = pictures(pipeline.generate(PROMPT, seed=3, **request))
            wanted = pictures(reference.generate(PROMPT, seed=3, **request))
            assert min(map(psnr, got, wanted)) > 25
        told = obstacle(pipeline)
        assert bool(told) == (not graphs and backend.startswith("ort-")), told


def test_graphs_do_not_change_a_bit(shapes: Bundle, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_built(shapes, backend) as captured:
        wanted = [pictures(captured.generate(PROMPT, seed=3, **request)) for request in REQUESTS * 2]
        assert not obstacle(captured)
    forbid_graphs(monkeypatch)
    with open_built(shapes, backend) as plain:
        got = [pictures(plain.generate(PROMPT, seed=3, **request)) for request in REQUESTS * 2]
    pairs = [pair for one, two in zip(got, wanted, strict=True) for pair in zip(one, two, strict=True)]
    assert all(np.array_equal(one, two) for one, two in pairs)


def test_pictures_that_come_and_go(shapes: Bundle, backend: str) -> None:
    """Each is painted beside others at other steps, in engines for one to three."""
    size: Any = {"height": 128, "width": 128}
    requests = [
        Request(PROMPT, seed=seed, sampler=sampler, num_inference_steps=steps, **size)
        for seed, (sampler, steps) in enumerate([("ddim", 9), ("euler_a", 8), ("dpmpp_2m", 10), ("euler", 8)])
    ]
    with open_built(shapes, backend) as pipeline:
        alone = [pictures(pipeline.paint(request))[0] for request in requests]
        waiting = [pipeline.prepare(*pipeline.settle(request)) for request in requests]
        lanes = pipeline.lanes(waiting[0].shape, 3)
        coming = list(waiting)
        while coming or lanes.paintings:
            if coming and len(lanes.paintings) < 3:
                lanes.admit(coming.pop(0))
            lanes.step()
            for painting in lanes.paintings:
                if painting.done:
                    lanes.release(painting)
        together = [pictures(pipeline.finish(painting))[0] for painting in waiting]
    assert min(map(psnr, together, alone)) > 25


def paint(pipeline: Pipeline, seed: int) -> NDArray[np.uint8]:
    return pictures(pipeline.generate(PROMPT, seed=seed))[0]


def test_two_pipelines(shapes: Bundle, backend: str) -> None:
    with open_built(shapes, backend) as one, open_built(shapes, backend) as two:
        alone = [paint(one, 1), paint(one, 2)]
        assert np.array_equal(paint(two, 1), alone[0])
        assert np.array_equal(paint(one, 2), alone[1])
        assert np.array_equal(paint(two, 2), alone[1])


def test_on_another_thread_than_it_was_opened_on(shapes: Bundle, backend: str) -> None:
    """As a server does it, which loads models while it paints."""
    with ThreadPoolExecutor(1) as other, open_built(shapes, backend) as pipeline:
        assert np.array_equal(other.submit(paint, pipeline, 1).result(), paint(pipeline, 1))


def test_memory_does_not_grow(shapes: Bundle, backend: str, gpu: Gpu) -> None:
    """Two hundred pictures of two sizes in turn, which capture each graph once."""
    with open_built(shapes, backend) as pipeline:
        for request in REQUESTS:
            pipeline.generate(PROMPT, seed=1, **request)
        gpu.synchronize()
        before = gpu.free_memory()[0]
        for seed in range(200):
            pipeline.generate(PROMPT, seed=seed, num_inference_steps=2, width=(128, 192)[seed % 2])
        gpu.synchronize()
        assert before - gpu.free_memory()[0] < 32e6


def test_blocks(gpu: Gpu) -> None:
    memory = CudaMemory(gpu)
    block = memory.allocate({"a": ((300,), np.float32), "b": ((2, 2), np.int64)})
    block.pull()
    assert not block.tensors["a"].array.any()
    others = [memory.allocate({"a": ((300,), np.float32)}) for _ in range(100)]
    for index, other in enumerate(others):
        block.tensors["a"].array[...] = index
        block.push()
        memory.copy(other.tensors["a"], block.tensors["a"])
    for index, other in enumerate(others):
        other.pull()
        assert (other.tensors["a"].array == index).all()


def test_out_of_memory(gpu: Gpu) -> None:
    with pytest.raises(BackendError, match=r"out of memory: .* MB free"):
        CudaMemory(gpu).allocate({"a": ((1 << 42,), np.uint8)})


def test_foreign_streams(gpu: Gpu) -> None:
    """Work may be put on somebody else's stream, by its handle."""
    other = Gpu(stream=gpu.stream)
    assert other.stream == gpu.stream
    block = CudaMemory(other).allocate({"a": ((8,), np.float32)})
    block.tensors["a"].array[...] = 5
    block.push()
    block.tensors["a"].array[...] = 0
    block.pull()
    assert (block.tensors["a"].array == 5).all()


@pytest.mark.parametrize("role", ["denoiser", "vae_decoder"])
def test_onnxruntime_uses_its_fast_kernels(shapes: Bundle, gpu: Gpu, tmp_path: Path, role: str) -> None:
    """Its profile: all but shapes runs on the GPU, attention in one kernel, nothing is copied."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("the installed onnxruntime is not the one for CUDA")
    component = shapes.component(role)
    options = session_options()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    chosen = [("CUDAExecutionProvider", CUDA.options(gpu, False)), "CPUExecutionProvider"]
    session = open_graph(shapes.path(component.graph), component, options, chosen)
    inputs = draw_inputs(component, {"B": 1, "G": 2, "L": 77, "H": 16, "W": 16}, 100)
    for _ in range(3):
        session.run(None, dict(inputs))
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [each["args"] for each in events if "op_name" in each.get("args", {})]
    on_gpu = [each["op_name"] for each in nodes if each.get("provider") == "CUDAExecutionProvider"]
    elsewhere = {each["op_name"] for each in nodes if each.get("provider") == "CPUExecutionProvider"}
    # GroupNormalization has no kernel: onnxruntime takes it apart into ReduceMean, Sub, Mul, Sqrt and others.
    heavy = {"Attention", "Conv", "Gemm", "MatMul", "LayerNormalization", "GroupNormalization", "ReduceMean"}
    since_22 = {"Sin", "Cos", "Round"}  # of a newer version of ONNX than many kernels
    parts = {"Sqrt", "Sigmoid", "Erf", "Resize"}
    assert not (heavy | since_22 | parts) & elsewhere, f"on the CPU: {sorted(elsewhere)}"
    assert any("Attention" in name for name in on_gpu) or role != "denoiser"
    copies = sum(name.startswith("Memcpy") for name in on_gpu)
    assert not copies, f"{copies} copies between CPU and GPU, beside nodes on the CPU: {sorted(elsewhere)}"
