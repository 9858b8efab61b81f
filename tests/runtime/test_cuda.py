"""The path on a GPU, on one that is made up.

Engines are TensorRT's interface over ONNX Runtime on the CPU, so pictures must be equal to the bit.
"""

import ast
import ctypes
import gc
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

import allaprima.runtime.cuda
from allaprima.bundle import BackendError, Bundle, EngineFile, Profile, RequestError
from allaprima.runtime import Pipeline, Request, exchange
from allaprima.runtime.cuda import CudaMemory, Gpu, default_gpu, use
from allaprima.runtime.exchange import Lent, borrow
from allaprima.runtime.flavours import load
from allaprima.runtime.footprint import Footprint
from allaprima.runtime.sessions.tensorrt import TensorrtSession

from .lazy_gpu import CAPTURING, STREAM, LazyGpu

NEED = {"text_encoder": 512, "denoiser": 1024, "vae_decoder": 4096}


class Logger:
    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)


class Engine:
    """TensorRT's ICudaEngine over an ONNX graph. The "plan" is JSON with the graph's path and profiles."""

    def __init__(self, gpu: LazyGpu, plan: dict[str, Any]) -> None:
        self.gpu, self.plan = gpu, plan
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(plan["graph"], options, ["CPUExecutionProvider"])
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.names = [*self.inputs, *(node.name for node in self.session.get_outputs())]
        self.num_io_tensors = len(self.names)
        self.streamable_weights_size = plan.get("streamable", 0)
        self.weight_streaming_scratch_memory_size = 0
        self.contexts, self._budget = 0, self.streamable_weights_size

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    @property
    def device_memory_size_v2(self) -> int:
        return int(self.plan["need"]) + (256 if self._budget < self.streamable_weights_size else 0)

    @property
    def weight_streaming_budget_v2(self) -> int:
        return int(self._budget)

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        assert not self.contexts
        assert 0 <= budget <= self.streamable_weights_size
        self._budget = budget
        self.weight_streaming_scratch_memory_size = 128

    def create_execution_context(self, strategy: object) -> "Context":
        assert strategy == "user"
        self.contexts += 1
        return Context(self)


class Context:
    """IExecutionContext: refuses whatever the real one would refuse or crash on."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.gpu = engine, engine.gpu
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch, self.warm, self.profile = (0, 0), False, -1

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        self.profile, self.shapes = profile_index, {}
        return profile_index < len(self.engine.plan["profiles"])

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile >= 0
        self.shapes[name] = shape
        return name in self.engine.inputs

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def update_device_memory_size_for_shapes(self) -> int:
        assert not self.infer_shapes()
        return int(self.engine.plan["need"])

    def set_device_memory(self, memory: int, size: int) -> None:
        self.scratch = memory, size

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % 4 == 0
        self.addresses[name] = memory
        return name in self.engine.names

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self.scratch[1] < self.engine.plan["need"] or set(self.addresses) != set(self.engine.names):
            return False
        if stream_handle == CAPTURING and not (self.warm and self.engine.plan["capturable"]):
            return False
        self.warm = True
        addresses, (scratch, size) = dict(self.addresses), self.scratch  # as a captured graph keeps them
        self.gpu.enqueue(lambda: self._compute(addresses, scratch, size), stream_handle)
        return True

    def _compute(self, addresses: dict[str, int], scratch: int, size: int) -> None:
        ctypes.memset(scratch, 0x77, size)
        feeds = {}
        for name, node in self.engine.inputs.items():
            dtype = np.dtype({"tensor(float)": "f4", "tensor(int64)": "i8"}[node.type])
            count = int(np.prod(self.shapes[name]))
            data = ctypes.string_at(addresses[name], count * dtype.itemsize)
            feeds[name] = np.frombuffer(data, dtype).reshape(self.shapes[name])
        outputs = self.engine.session.run(None, feeds)
        for name, value in zip(self.engine.names[len(feeds) :], outputs, strict=True):
            ctypes.memmove(addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)


def make_module(gpu: LazyGpu) -> Any:
    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            try:
                return Engine(gpu, json.loads(plan))
            except ValueError:
                self.logger.log(Logger.Severity.ERROR, "the plan is damaged")
                return None

    strategies = SimpleNamespace(USER_MANAGED="user")
    return SimpleNamespace(ILogger=Logger, Runtime=Runtime, ExecutionContextAllocationStrategy=strategies)


def write_plan(
    bundle: Bundle,
    role: str,
    folder: Path,
    *profiles: dict[str, tuple[int, int, int]],
    capturable: bool = True,
) -> EngineFile:
    path = folder / f"{role}-{len(list(folder.iterdir()))}.plan"
    graph = str(bundle.path(bundle.component(role).graph))
    plan = {"graph": graph, "profiles": profiles, "need": NEED[role], "capturable": capturable}
    path.write_text(json.dumps(plan))
    return EngineFile(path, tuple(Profile(extents) for extents in profiles))


def sides(height: int, width: int) -> dict[str, tuple[int, int, int]]:
    return {"H": (height, height, height), "W": (width, width, width)}


def open_pipeline(
    bundle: Bundle, gpu: LazyGpu, folder: Path, *, capturable: bool = True, **options: Any
) -> Pipeline:
    """Engines for 64 x 32 and 32 x 64 pixels, the latter in a plan of its own. Every text is encoded."""
    branches = {"G": (1, 2, 2)}
    plans = {
        "text_encoder": [write_plan(bundle, "text_encoder", folder, {"B": (1, 2, 2)})],
        "vae_decoder": [
            write_plan(bundle, "vae_decoder", folder, {"B": (1, 1, 1), **sides(8, 4)}),
            write_plan(bundle, "vae_decoder", folder, {"B": (1, 1, 1), **sides(4, 8)}),
        ],
        "denoiser": [
            write_plan(
                bundle,
                "denoiser",
                folder,
                {"B": (1, 1, 1), **branches, **sides(8, 4)},
                {"B": (2, 3, 3), **branches, **sides(8, 4)},
                capturable=capturable,
            ),
            write_plan(bundle, "denoiser", folder, {"B": (1, 1, 1), **branches, **sides(4, 8)}),
        ],
    }
    module = make_module(gpu)
    sessions = {
        role: TensorrtSession(each, bundle.component(role), gpu, module) for role, each in plans.items()
    }
    return Pipeline(bundle, sessions, backend="tensorrt", **{"embedding_cache": 0, **options})


def pixels(result: Any) -> list[bytes]:
    return [image.tobytes() for image in result.images]


REQUESTS: list[dict[str, Any]] = [
    {"sampler": "ddim", "num_inference_steps": 6, "height": 64, "width": 32},
    {"sampler": "euler_a", "num_inference_steps": 7, "height": 64, "width": 32, "num_images": 3},
    {"sampler": "dpmpp_2m", "num_inference_steps": 5, "height": 32, "width": 64, "guidance_scale": 1.0},
    {"sampler": "ddpm", "num_inference_steps": 9, "height": 64, "width": 32},
]


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_same_pictures_as_on_the_cpu(bundle: Bundle, tmp_path: Path, watched: bool, capturable: bool) -> None:
    gpu = LazyGpu()
    seen: list[bytes] = []
    wanted: list[bytes] = []
    with (
        open_pipeline(bundle, gpu, tmp_path, capturable=capturable) as device,
        Pipeline.open(bundle.folder, backend="ort", threads=1) as host,
    ):
        for request in REQUESTS * 2:  # shapes change back and forth
            tell = (lambda into: lambda progress: into.append(progress.sample.tobytes())) if watched else None
            got = device.generate("a red circle", seed=5, callback=tell and tell(seen), **request)
            right = host.generate("a red circle", seed=5, callback=tell and tell(wanted), **request)
            assert pixels(got) == pixels(right)
        assert seen == wanted
        assert bool(gpu.launches) or not capturable


@pytest.mark.parametrize("capturable", [False, True])
def test_pictures_that_come_and_go(bundle: Bundle, tmp_path: Path, capturable: bool) -> None:
    """Lanes are copied on the device, in order with its work; an odd number of them leaves one idle."""
    gpu = LazyGpu()
    size: Any = {"height": 64, "width": 32, "output_type": "latent"}
    requests = [
        Request("a red circle", seed=seed, sampler=sampler, num_inference_steps=steps, **size)
        for seed, (sampler, steps) in enumerate(
            [("ddim", 4), ("euler_a", 3), ("dpmpp_2m", 6), ("ddpm", 2), ("heun", 3)]
        )
    ]
    with (
        open_pipeline(bundle, gpu, tmp_path, capturable=capturable) as device,
        Pipeline.open(bundle.folder, backend="ort", threads=1) as host,
    ):
        waiting = [device.prepare(*device.settle(request)) for request in requests]
        lanes = device.lanes(waiting[0].shape, 3)
        coming = list(waiting)
        while coming or lanes.paintings:
            if coming and len(lanes.paintings) < 3:
                lanes.admit(coming.pop(0))
            lanes.step()
            for painting in lanes.paintings:
                if painting.done:
                    lanes.release(painting)
        for painting, request in zip(waiting, requests, strict=True):
            alone, together = host.paint(request).latents, device.finish(painting).latents
            assert alone is not None
            assert together is not None
            assert alone.tobytes() == together.tobytes()
        assert bool(gpu.launches) or not capturable


def test_on_another_thread_than_it_was_opened_on(bundle: Bundle, tmp_path: Path) -> None:
    """As a server does it, which loads models while it paints."""
    with (
        ThreadPoolExecutor(1) as other,
        Pipeline.open(bundle.folder, backend="ort", threads=1) as host,
        open_pipeline(bundle, LazyGpu(), tmp_path) as device,
    ):
        made = other.submit(lambda: device.generate("a red circle", seed=5, **REQUESTS[0])).result()
        assert pixels(made) == pixels(host.generate("a red circle", seed=5, **REQUESTS[0]))


def test_no_waiting_between_steps(bundle: Bundle, tmp_path: Path) -> None:
    gpu = LazyGpu()
    with open_pipeline(bundle, gpu, tmp_path) as device:
        for steps in (5, 50):
            gpu.waits = 0
            device.generate("a red circle", sampler="euler_a", num_inference_steps=steps, height=64, width=32)
            assert gpu.waits == 2  # the latents at the end, to see that they are finite, and the picture


def test_graphs_are_launched_and_follow_the_scratch_area(bundle: Bundle, tmp_path: Path) -> None:
    gpu = LazyGpu()
    with open_pipeline(bundle, gpu, tmp_path) as device:
        request = {"num_inference_steps": 6, "height": 64, "width": 32, "seed": 1}
        first = device.generate("a red circle", **request)
        launched = gpu.launches
        assert launched == 4  # each of the two bindings ran once before
        gpu.scratch(1 << 16)  # moves it
        again = device.generate("a red circle", **request)
        assert gpu.launches - launched == 4
        assert pixels(first) == pixels(again)
        device.generate("a red circle", **request)
        assert gpu.launches - launched == 4 + 6 + 2  # the text encoder and the decoder have theirs too


def test_memory_does_not_grow(bundle: Bundle, tmp_path: Path) -> None:
    gpu = LazyGpu()
    with open_pipeline(bundle, gpu, tmp_path) as device:
        used = []
        for index in range(6):
            for request in REQUESTS[:3]:
                device.generate("a red circle", seed=index, **request)
            gpu.queue.clear()
            gc.collect()
            used.append(gpu.used())
        assert len(set(used)) == 1
    gpu.queue.clear()
    gpu._scratch = None
    gc.collect()
    del device
    gc.collect()
    assert gpu.used() == 0


def test_lanes_wait_before_they_let_go(bundle: Bundle, tmp_path: Path) -> None:
    """A context that is destroyed while the device still works with it takes the process with it."""
    gpu = LazyGpu()
    request = Request("a red circle", seed=1, sampler="ddim", num_inference_steps=3, height=64, width=32)
    with open_pipeline(bundle, gpu, tmp_path) as device:
        painting = device.prepare(*device.settle(request))
        lanes = device.lanes(painting.shape, 1)
        lanes.admit(painting)
        lanes.step()
        gpu.waits = 0
        lanes.drop()
        assert gpu.waits == 1


def test_denoisers_of_the_last_shapes_keep_their_graphs(bundle: Bundle, tmp_path: Path) -> None:
    gpu = LazyGpu()
    with open_pipeline(bundle, gpu, tmp_path) as device:
        for _ in range(2):
            device.generate("a red circle", seed=1, **REQUESTS[0])
            device.generate("a red circle", seed=1, **REQUESTS[2])
        gpu.launches = 0
        device.generate("a red circle", seed=1, **REQUESTS[0])
        assert gpu.launches == 6 + 1  # every step of them, and the text encoder's


def test_kept_denoisers_make_room(bundle: Bundle, tmp_path: Path) -> None:
    """What is kept for later never is what a picture lacks."""
    gpu = LazyGpu()
    request: dict[str, Any] = {"num_inference_steps": 3, "seed": 1}
    with open_pipeline(bundle, gpu, tmp_path) as device:
        wanted = pixels(device.generate("a red circle", height=32, width=64, **request))
        device.unload()
        device.generate("a red circle", height=64, width=32, **request)
        gc.collect()
        gpu.limit = gpu.used()
        assert pixels(device.generate("a red circle", height=32, width=64, **request)) == wanted


def test_unloaded(bundle: Bundle, tmp_path: Path) -> None:
    gpu = LazyGpu()
    request = {"num_inference_steps": 3, "height": 64, "width": 32, "seed": 1}
    with open_pipeline(bundle, gpu, tmp_path) as device:
        before = pixels(device.generate("a red circle", **request))
        device.unload()
        gpu.queue.clear()
        gc.collect()
        assert gpu.used() == gpu._scratch.size
        assert pixels(device.generate("a red circle", **request)) == before


def test_out_of_memory(bundle: Bundle, tmp_path: Path) -> None:
    gpu = LazyGpu(limit=60_000)
    with open_pipeline(bundle, gpu, tmp_path) as device:
        request = {"num_inference_steps": 2, "height": 64, "width": 32, "seed": 1}
        before = pixels(device.generate("a red circle", **request))
        gpu.limit = gpu.used()
        with pytest.raises(BackendError, match=r"out of memory: \d+ MB .* free\. Lower num_images"):
            device.generate("a red circle", num_images=3, **request)
        gpu.limit = 1 << 30
        assert pixels(device.generate("a red circle", **request)) == before


def test_shapes_that_no_engine_serves(bundle: Bundle, tmp_path: Path) -> None:
    with open_pipeline(bundle, LazyGpu(), tmp_path) as device:
        before = device.generate("a red circle", num_inference_steps=2, height=64, width=32, seed=1)
        with pytest.raises(RequestError, match=r"built for .*H 8, W 8; the nearest is for B 1.* --shapes"):
            device.generate("a red circle", num_inference_steps=2, height=64, width=64)
        after = device.generate("a red circle", num_inference_steps=2, height=64, width=32, seed=1)
        assert pixels(before) == pixels(after)


def test_plan_that_cannot_be_loaded(bundle: Bundle, tmp_path: Path) -> None:
    gpu = LazyGpu()
    path = tmp_path / "bad.plan"
    path.write_bytes(b"\x00")
    plan = EngineFile(path, (Profile({"B": (1, 1, 1), **sides(8, 4)}),))
    session = TensorrtSession([plan], bundle.component("vae_decoder"), gpu, make_module(gpu))
    block = session.memory.allocate(
        {"sample": ((1, 4, 8, 4), np.float32), "image": ((1, 64, 32, 3), np.uint8)}
    )
    with pytest.raises(
        BackendError, match=r"bad\.plan cannot be loaded: the plan is damaged\. Build it again"
    ):
        session.bind(block.tensors)
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session.bind(block.tensors)


@pytest.mark.parametrize(
    ("limit", "streamable", "budget"),
    [(None, 1000, 1000), (10**6, 1000, 1000), (4_200, 1000, None), (10, 1000, 0), (10, 0, 0)],
)
def test_the_budget_of_streamed_weights_follows_the_limit(
    bundle: Bundle, tmp_path: Path, limit: int | None, streamable: int, budget: int | None
) -> None:
    gpu = LazyGpu()
    file = write_plan(bundle, "vae_decoder", tmp_path, {"B": (1, 1, 1), **sides(8, 4)})
    plan = {**json.loads(file.path.read_text()), "streamable": streamable}
    file.path.write_text(json.dumps(plan))
    session = TensorrtSession(
        [file], bundle.component("vae_decoder"), gpu, make_module(gpu), memory_limit=limit
    )
    layout = {"sample": ((1, 4, 8, 4), np.float32), "image": ((1, 64, 32, 3), np.uint8)}
    session.bind(session.memory.allocate(layout).tensors)
    (engine,) = vars(session)["_engines"].values()
    if budget is None:  # what is left beside the rest of the plan, activations, and the streaming's own
        budget = 4_200 - (file.path.stat().st_size - streamable) - NEED["vae_decoder"] - 256 - 128
        assert 0 < budget < streamable
    assert engine.weight_streaming_budget_v2 == budget


def test_within_a_memory_limit(bundle: Bundle, tmp_path: Path) -> None:
    """Weights go while the device still has work queued that needs them: it must be waited for."""
    gpu, request = LazyGpu(), REQUESTS[1]
    with open_pipeline(bundle, LazyGpu(), tmp_path) as plain:
        wanted = pixels(plain.generate("a red circle", seed=5, **request))
    whole = {role: Footprint(10**9, 10**9) for role in NEED}
    limits: dict[str, Any] = {"memory_limit": 1_500_000_000, "weigh": whole.__getitem__}
    with open_pipeline(bundle, gpu, tmp_path, **limits) as device:
        for _ in range(2):
            result = device.generate("a red circle", seed=5, **request)
            assert result.memory is not None
            assert result.memory.loaded == tuple(NEED)
            assert pixels(result) == wanted
            held = [role for role, each in device._components.sessions.items() if vars(each)["_loaded"]]
            assert held == ["vae_decoder"]


def test_blocks_keep_what_was_pushed() -> None:
    """A push takes the arrays as they are, however late the copies are made, and however many there are."""
    gpu = LazyGpu()
    memory = CudaMemory(gpu)
    block = memory.allocate({"a": ((300,), np.float32), "b": ((2, 2), np.int64)})
    kept = [memory.allocate({"a": ((300,), np.float32)}) for _ in range(150)]
    a, b = block.tensors["a"], block.tensors["b"]
    assert a.address % 256 == b.address % 256 == 0
    for index, each in enumerate(kept):
        a.array[...] = index
        b.array[...] = -index
        block.push()
        memory.copy(each.tensors["a"], a)
        a.array[...] = np.nan
    for index, each in enumerate(kept):
        each.pull()
        assert (each.tensors["a"].array == index).all()
    block.pull()
    assert (b.array == -149).all()


def test_pinned_memory_is_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than a step."""
    gpu, sizes = LazyGpu(), list[int]()
    pinned = gpu.pinned
    monkeypatch.setattr(gpu, "pinned", lambda size: [sizes.append(size), pinned(size)][1])
    small, large = ({"a": ((count,), np.uint8)} for count in (300, 1 << 20))
    for layout in (small, large):
        block = CudaMemory(gpu).allocate(layout)
        for _ in range(20):
            block.push()
        block.pull()
    assert sizes == [8 * 512, 2 << 20]


def test_tensor_keeps_its_memory() -> None:
    gpu = LazyGpu()
    part = CudaMemory(gpu).allocate({"a": ((4, 5), np.float32)}).tensors["a"][3].reshape(5, 1)
    gpu.synchronize()
    gpu.queue.clear()
    gc.collect()
    assert len(gpu.alive) == 1
    assert part.array.shape == (5, 1)
    del part
    gc.collect()
    assert not gpu.alive


def test_no_gpu_says_so() -> None:
    pytest.importorskip("cuda.core")
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match=r"^no NVIDIA GPU works here: [^\n]+$"):
        Gpu()


def test_without_a_driver_nothing_of_cuda_is_imported() -> None:
    """Importing cuda.core takes longer than everything else that a process does before it paints."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    code = "import sys; from allaprima.runtime import decide; decide(); print('cuda' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_cuda_core_has_what_we_use() -> None:
    """Every attribute that runtime/cuda.py asks of cuda.core's objects exists."""
    core, graph = pytest.importorskip("cuda.core"), pytest.importorskip("cuda.core.graph")
    driver = pytest.importorskip("cuda.bindings.driver")
    owners = {
        "self._device": core.Device,
        "device": core.Device,
        "self._stream": core.Stream,
        "Stream": core.Stream,
        "buffer": core.Buffer,
        "event": core.Event,
        "builder": graph.GraphBuilder,
        "graph": graph.Graph,
        "self._driver": driver,
    }
    source = ast.parse(Path(allaprima.runtime.cuda.__file__).read_text(encoding="utf-8"))
    used = {
        (ast.unparse(node.value), node.attr)
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in owners
    }
    assert {owner for owner, _ in used} == owners.keys()
    assert [pair for pair in sorted(used) if not hasattr(owners[pair[0]], pair[1])] == []


def test_arrays_of_others(bundle: Bundle, tmp_path: Path) -> None:
    """Lent by one library and borrowed by another: the session works in that memory, and keeps it."""
    gpu = LazyGpu()
    plan = write_plan(bundle, "vae_decoder", tmp_path, {"B": (1, 1, 1), **sides(8, 4)})
    session = TensorrtSession([plan], bundle.component("vae_decoder"), gpu, make_module(gpu))
    theirs = CudaMemory(gpu).allocate({"sample": ((1, 4, 8, 4), np.float32)})
    theirs.tensors["sample"].array[...] = np.linspace(-1, 1, 128).reshape(1, 4, 8, 4)
    theirs.push()
    sample = borrow(Lent(theirs.tensors["sample"], gpu))
    assert sample.address == theirs.tensors["sample"].address
    image = session.memory.allocate({"image": ((1, 64, 32, 3), np.uint8)})
    binding = session.bind({"sample": sample, **image.tensors})
    wanted = theirs.tensors["sample"].array.copy()
    del theirs, sample
    gc.collect()
    binding.run()
    image.pull()
    pixels = np.round(np.clip(255 * (wanted[0, :3] / 2 + 0.5), 0, 255)).transpose(1, 2, 0)
    assert np.array_equal(image.tensors["image"].array[0], pixels.repeat(8, 0).repeat(8, 1))


def test_lent_by_dlpack(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy takes it, told that the made-up GPU is a CPU; it keeps the memory, and gives it back."""
    monkeypatch.setattr(exchange, "_CUDA", 1)
    gpu = LazyGpu()
    block = CudaMemory(gpu).allocate({"a": ((3, 4), np.float32), "b": ((5,), np.int64)})
    block.tensors["a"].array[...] = np.arange(12).reshape(3, 4)
    block.push()
    taken = np.from_dlpack(Lent(block.tensors["a"], gpu))
    assert taken.ctypes.data == block.tensors["a"].address
    assert np.array_equal(taken, np.arange(12).reshape(3, 4))
    assert np.from_dlpack(Lent(block.tensors["b"], gpu)).dtype == np.int64
    ignored = Lent(block.tensors["a"], gpu).__dlpack__()
    assert len(exchange._LENT) == 2
    del ignored
    assert len(exchange._LENT) == 1
    del block
    gpu.queue.clear()
    gc.collect()
    assert len(gpu.alive) == 1
    assert taken[2, 3] == 11
    del taken
    gc.collect()
    assert not gpu.alive
    assert not exchange._LENT


def test_what_cannot_be_borrowed() -> None:
    with pytest.raises(BackendError, match="ndarray is not on the GPU"):
        borrow(np.zeros(3))
    with pytest.raises(BackendError, match="list has neither __cuda_array_interface__ nor __dlpack__"):
        borrow([1, 2])
    interface = {"shape": (2, 3), "typestr": "<f4", "data": (4096, False), "strides": (4, 8), "version": 3}
    with pytest.raises(BackendError, match=r"strides \(4, 8\): hand in a C-contiguous"):
        borrow(SimpleNamespace(__cuda_array_interface__=interface))


@pytest.mark.parametrize("strides", [None, (96, 12, 4), (4, 12, 4), (1 << 40, 12, 4)])
def test_strides_of_axes_of_size_one_do_not_matter(strides: tuple[int, ...] | None) -> None:
    interface = {"shape": (1, 2, 3), "typestr": "<f4", "data": (4096, False), "strides": strides}
    tensor = borrow(SimpleNamespace(__cuda_array_interface__={**interface, "version": 3}))
    assert (tensor.array.shape, tensor.address) == ((1, 2, 3), 4096)


class Guarded:
    """The device, the stream, the driver and an event in one: whatever enqueues asks for the lock."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.handle, self.asked = gpu, 4096, list[str]()
        self.modes = ["global"]
        self.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")

    def _enqueue(self, what: str) -> Any:
        assert self.gpu.exclusive._is_owned()  # type: ignore[attr-defined]
        self.asked.append(what)
        return self

    def allocate(self, size: int, *, stream: Any) -> Any:
        return self._enqueue("allocate")

    def fill(self, value: int, *, stream: Any) -> None:
        self._enqueue("fill")

    def record(self, options: Any = None) -> Any:
        return self._enqueue("record")

    def cuMemcpyAsync(self, *_: int) -> tuple[int]:  # noqa: N802
        self._enqueue("copy")
        return (0,)

    def sync(self) -> None:
        assert not self.gpu.exclusive._is_owned()  # type: ignore[attr-defined]
        assert self.modes[-1] == "relaxed"
        self.asked.append("wait")

    def cuThreadExchangeStreamCaptureMode(self, mode: str) -> tuple[int, str]:  # noqa: N802
        self.modes.append(mode)
        return 0, self.modes[-2]


def test_nobody_gets_into_the_graph_of_another() -> None:
    """What enqueues holds the lock; what waits does not, and may do so while another thread captures."""
    gpu = Gpu.__new__(Gpu)
    gpu.exclusive = threading.RLock()
    guarded = Guarded(gpu)
    vars(gpu).update(_device=guarded, _stream=guarded, _driver=guarded)
    gpu.allocate(8)
    gpu.copy(0, 8, 4)
    gpu.record()()
    gpu.synchronize()
    assert guarded.asked == ["allocate", "fill", "copy", *["record", "wait"] * 2]
    assert guarded.modes == ["global", *["relaxed", "global"] * 2]


def test_a_gpu_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allaprima.runtime.cuda, "_default", None)
    gpu = LazyGpu()
    use(gpu)
    assert default_gpu() is gpu


def test_plan_that_tensorrt_rtx_refuses(bundle: Bundle, tmp_path: Path) -> None:
    """The real library, which reads a plan's header without a GPU."""
    try:
        module = load("tensorrt-rtx")
    except BackendError as cause:
        pytest.skip(str(cause))
    path = tmp_path / "bad.plan"
    path.write_bytes(b"This is no plan at all. " * 20)
    file = EngineFile(path, (Profile({"B": (1, 1, 1), **sides(8, 4)}),))
    session = TensorrtSession([file], bundle.component("vae_decoder"), LazyGpu(), module)
    block = session.memory.allocate(
        {"sample": ((1, 4, 8, 4), np.float32), "image": ((1, 64, 32, 3), np.uint8)}
    )
    with pytest.raises(BackendError, match=r"bad\.plan cannot be loaded: it is damaged\. Build it again"):
        session.bind(block.tensors)
