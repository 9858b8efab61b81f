"""ONNX Runtime's CUDA provider, on a GPU that is made up: its interface over ONNX Runtime on the CPU.

It keeps every graph that was captured, replays one with the addresses that it was captured with, and leaves
out a provider that it cannot load without a word, as the real one does.
"""

import ctypes
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

import allaprima.runtime.cuda
from allaprima.bundle import BackendError, Bundle
from allaprima.runtime import Pipeline, backends, open_session
from allaprima.runtime.sessions import ort_cuda

from .lazy_gpu import LazyGpu

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libraries have other names there")
LIBRARY = "libonnxruntime_providers_cuda.so"
GRAPH = 10_000
"""Bytes of a captured graph."""
REQUESTS: list[dict[str, Any]] = [
    {"sampler": "ddim", "num_inference_steps": 6, "height": 64, "width": 32},
    {"sampler": "euler_a", "num_inference_steps": 7, "height": 64, "width": 32, "num_images": 3},
    {"sampler": "dpmpp_2m", "num_inference_steps": 5, "height": 32, "width": 64, "guidance_scale": 1.0},
]


class OrtModule(ModuleType):
    """The package onnxruntime: the real one, but for its sessions and what it prints.

    `capturable`: it leaves no node to the CPU. `breaks`: capturing fails all the same. `loads`: the provider.
    """

    def __init__(self, gpu: LazyGpu, folder: Path) -> None:
        super().__init__("onnxruntime")
        self.__file__ = str(folder / "onnxruntime" / "__init__.py")
        self.gpu, self.captured, self.preloaded = gpu, 0, list[str | None]()
        self.capturable = self.loads = True
        self.breaks = False
        self.InferenceSession = lambda *given, **named: OrtSession(self, *given, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self, *, directory: str | None = None) -> None:
        self.preloaded.append(directory)
        sys.stdout.write("Failed to load libcufft.so.12\n")


class OrtSession:
    def __init__(
        self,
        module: OrtModule,
        path: Path,
        options: Any,
        providers: list[Any],
        enable_fallback: int = 1,
    ) -> None:
        assert not enable_fallback, "it would print, and take the CPU"
        self.module, self.graphs = module, dict[int, tuple[dict[str, int], Any]]()
        (provider, settings), *_ = providers
        assert provider == "CUDAExecutionProvider"
        self.enabled = settings["enable_cuda_graph"] == "1"
        self.providers = ["CUDAExecutionProvider"] * module.loads + ["CPUExecutionProvider"]
        if self.enabled and not module.capturable:
            raise RuntimeError("This session cannot use the graph capture feature")
        options.intra_op_num_threads = 1
        self.real = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def get_providers(self) -> list[str]:
        return self.providers

    def io_binding(self) -> "OrtBinding":
        return OrtBinding()

    def run_with_iobinding(self, binding: "OrtBinding", options: Any) -> None:
        number = int(options.get_run_config_entry("gpu_graph_id"))
        assert number != 0, "runs that name no graph take this one"
        addresses = dict(binding.addresses)
        if number > 0 and self.enabled:
            if self.module.breaks:
                raise RuntimeError("operation not permitted when stream is capturing")
            if number not in self.graphs:
                self.module.captured += 1
                self.graphs[number] = addresses, self.module.gpu.allocate(GRAPH)
            addresses, _ = self.graphs[number]
        self.module.gpu.enqueue(lambda: self._compute(binding.types, addresses))

    def _compute(self, types: dict[str, tuple[Any, tuple[int, ...]]], addresses: dict[str, int]) -> None:
        feeds = {}
        for node in self.real.get_inputs():
            dtype, shape = types[node.name]
            data = ctypes.string_at(addresses[node.name], int(np.prod(shape)) * np.dtype(dtype).itemsize)
            feeds[node.name] = np.frombuffer(data, dtype).reshape(shape)
        outputs = self.real.run(None, feeds)
        for node, value in zip(self.real.get_outputs(), outputs, strict=True):
            ctypes.memmove(addresses[node.name], np.ascontiguousarray(value).ctypes.data, value.nbytes)


class OrtBinding:
    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.types: dict[str, tuple[Any, tuple[int, ...]]] = {}

    def bind_input(self, name: str, device: str, index: int, dtype: Any, shape: Any, address: int) -> None:
        if address % 256 and name == "sample":
            raise RuntimeError("misaligned")
        assert (device, index) == ("cuda", 0)
        self.addresses[name], self.types[name] = address, (dtype, shape)

    bind_output = bind_input


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> LazyGpu:
    made = LazyGpu()
    monkeypatch.setattr(allaprima.runtime.cuda, "_default", made)
    return made


@pytest.fixture
def ort(gpu: LazyGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OrtModule:
    """The provider's library is another that every onnxruntime has, and that loads."""
    module = OrtModule(gpu, tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    folder = tmp_path / "onnxruntime" / "capi"
    folder.mkdir(parents=True)
    real = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_shared.so"
    (folder / LIBRARY).symlink_to(real)
    ort_cuda._load.cache_clear()
    return module


def open_gpu(bundle: Bundle) -> Pipeline:
    return Pipeline.open(bundle.folder, backend="ort-cuda", embedding_cache=0)


def open_decoder(bundle: Bundle) -> Any:
    decoder = bundle.component("vae_decoder")
    return open_session(bundle.path(decoder.graph), decoder, "ort-cuda")


def pixels(result: Any) -> list[bytes]:
    return [image.tobytes() for image in result.images]


def paint_all(bundle: Bundle, backend: str, times: int = 2) -> list[list[bytes]]:
    with Pipeline.open(bundle.folder, backend=backend, embedding_cache=0) as pipeline:
        return [pixels(pipeline.generate("a red circle", seed=5, **each)) for each in REQUESTS * times]


@pytest.mark.parametrize("capturable", [False, True])
def test_same_pictures_as_on_the_cpu(bundle: Bundle, ort: OrtModule, capturable: bool) -> None:
    ort.capturable = capturable
    got = paint_all(bundle, "ort-cuda")
    assert bool(ort.captured) == capturable
    ort.InferenceSession = onnxruntime.InferenceSession
    assert got == paint_all(bundle, "ort")


def test_why_steps_are_not_captured_is_told(
    bundle: Bundle, ort: OrtModule, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_decoder(bundle).captures
    assert not caplog.records
    ort.capturable = False
    with caplog.at_level(logging.WARNING, "allaprima.runtime"):
        session = open_decoder(bundle)
    assert not session.captures
    (record,) = caplog.records
    said = record.getMessage()
    assert said.endswith(session.obstacle)
    assert "vae_decoder/model.onnx runs slower, without CUDA graphs: onnxruntime cannot load" in said
    assert "cannot use the graph capture feature; nodes that are not on the GPU: " in said
    assert "1 Round" in said


def test_a_capture_that_fails_is_made_good_for(
    bundle: Bundle, ort: OrtModule, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = paint_all(bundle, "ort-cuda", 1)
    ort.breaks = True
    assert paint_all(bundle, "ort-cuda", 1) == wanted
    assert "without a CUDA graph: onnxruntime failed: operation not permitted" in caplog.text


def test_sizes_that_alternate_capture_nothing_again(bundle: Bundle, ort: OrtModule, gpu: LazyGpu) -> None:
    """And what is bound only to run once captures nothing at all."""
    with open_gpu(bundle) as pipeline:
        for seed in range(12):
            pipeline.generate("a red circle", seed=seed, **REQUESTS[2 * (seed % 2)])
            if seed == 3:
                used = gpu.used()
        assert ort.captured == 6  # two for each size, and those of one prompt and of two
        assert gpu.used() == used


@pytest.mark.parametrize("most", [1, 3])
def test_a_session_that_is_full_of_graphs_is_opened_anew(
    bundle: Bundle, ort: OrtModule, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    wanted = paint_all(bundle, "ort-cuda")
    opened: list[OrtSession] = []
    plain = ort.InferenceSession

    def record(*given: Any, **named: Any) -> OrtSession:
        opened.append(plain(*given, **named))
        return opened[-1]

    monkeypatch.setattr(ort, "InferenceSession", record)
    monkeypatch.setattr(ort_cuda, "CAPTURES", most)
    assert paint_all(bundle, "ort-cuda") == wanted
    assert len(opened) > 3  # text encoder, denoiser and decoder
    assert max(len(each.graphs) for each in opened) == most


def test_unloaded_graphs_are_captured_again(bundle: Bundle, ort: OrtModule, gpu: LazyGpu) -> None:
    with open_gpu(bundle) as pipeline:
        before = pixels(pipeline.generate("a red circle", seed=1, **REQUESTS[0]))
        captured = ort.captured
        pipeline.unload()
        gpu.queue.clear()
        assert gpu.used() == 0
        assert pixels(pipeline.generate("a red circle", seed=1, **REQUESTS[0])) == before
        assert ort.captured == 2 * captured


def test_a_provider_that_is_left_out_is_an_error(bundle: Bundle, ort: OrtModule) -> None:
    ort.loads = False
    with pytest.raises(BackendError, match=r"could not start its CUDAExecutionProvider for .*model\.onnx"):
        open_decoder(bundle)


def test_a_library_that_is_missing_is_named(ort: OrtModule) -> None:
    (Path(str(ort.__file__)).parent / "capi" / LIBRARY).unlink()
    info = next(each for each in backends() if each.name == "ort-cuda")
    assert not info.available
    assert f"cannot load {LIBRARY}: " in info.reason
    assert "cannot open shared object file" in info.reason


def test_libraries_are_found_wherever_they_are(
    ort: OrtModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the folders of a namespace package, beside onnxruntime or not, before anything else looks."""
    paths = [
        tmp_path / site / "nvidia" / part / "lib" / name
        for site, part, name in (
            ("b", "cu13", "libcublasLt.so.13"),
            ("b", "cu13", "libcublas.so.13"),
            ("a", "cudnn", "libcudnn.so.9"),
            ("a", "cudnn", "libcudnn_graph.so.9"),
        )
    ]
    for path in [*paths, tmp_path / "a" / "nvidia" / "cudnn" / "lib" / "libother.so.1"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path / site / "nvidia") for site in "ab"])
    monkeypatch.setattr(ort_cuda.importlib.util, "find_spec", {"nvidia": found}.get)
    loaded: list[str] = []

    def load(path: str) -> None:
        assert ort.preloaded == [None] * path.endswith(LIBRARY)
        loaded.append(path)
        if path == str(paths[0]):
            raise OSError("not a library")

    monkeypatch.setattr(ort_cuda.ctypes, "CDLL", load)
    ort_cuda._load("cuda")
    ort_cuda._load("cuda")
    assert loaded[:-1] == [str(path) for path in paths]
    assert capsys.readouterr().out == ""


def test_tensors_that_cannot_be_bound(bundle: Bundle, ort: OrtModule) -> None:
    session = open_decoder(bundle)
    block = session.memory.allocate(
        {"sample": ((1, 4, 8, 4), np.float32), "gap": ((1,), np.uint8), "image": ((1, 64, 32, 3), np.uint8)}
    )
    sample = block.tensors["sample"]
    moved = type(sample)(sample.array, sample.address + 4, sample.owner)
    with pytest.raises(BackendError, match="cannot bind its tensors on cuda: misaligned"):
        session.bind({"sample": moved, "image": block.tensors["image"]})
