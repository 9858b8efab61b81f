"""ONNX Runtime on an NVIDIA GPU: its CUDA and TensorRT providers, on our buffers, stream and graphs."""

from __future__ import annotations

import importlib
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allaprima.bundle import BackendError, Component, EngineFile, TensorSpec
from allaprima.runtime.cuda import CudaMemory, Gpu, default_gpu
from allaprima.runtime.footprint import Footprint, stored
from allaprima.runtime.memory import Memory, Tensor
from allaprima.runtime.session import check_tensors
from allaprima.runtime.sessions.gpu_driver import GpuDriver, check_precision
from allaprima.runtime.sessions.ort import Reopened, bind_addresses, open_graph, session_options

Options = dict[str, str]


@dataclass(frozen=True)
class OrtGpuDriver(GpuDriver):
    """See backends.Driver. One for each of ONNX Runtime's providers for NVIDIA GPUs.

    `options` gives a provider's options for a GPU, with or without CUDA graphs. `plugin` is the package that
    brings a provider which does not come with onnxruntime itself.
    """

    provider: str
    options: Callable[[Gpu, bool], Options]
    plugin: str = ""

    def version(self) -> str:
        """The version of onnxruntime; BackendError, or what its import raises, if it cannot be used."""
        default_gpu()  # first, since it fails faster than onnxruntime is imported
        import onnxruntime

        if self.plugin:
            self._register()
        elif self.provider not in onnxruntime.get_available_providers():
            raise BackendError(f"the installed onnxruntime {onnxruntime.__version__} has no {self.provider}")
        return str(onnxruntime.__version__)

    def open_session(
        self,
        graph: Path,
        component: Component,
        *,
        precision: str | None,
        threads: int | None,
        engines: Sequence[EngineFile],
        memory_limit: int | None,
    ) -> OrtCudaSession:
        """Load a graph; `backends.open_session` says the rest."""
        check_precision("onnxruntime", component, precision)
        return OrtCudaSession(graph, component, default_gpu(), self, lazy=memory_limit is not None)

    def footprint(
        self, graph: Path, component: Component, engines: Sequence[EngineFile], *, precision: str
    ) -> Footprint:
        """One copy of the weights; not measured yet."""
        return Footprint(stored(graph, component), stored(graph, component))

    def open_graph(self, path: Path, component: Component, gpu: Gpu, *, graphs: bool) -> Any:
        """An onnxruntime.InferenceSession, with the CPU for what the provider leaves if `graphs` is off."""
        import onnxruntime

        chosen, settings = self.options(gpu, graphs), session_options()
        if self.plugin:
            settings.add_provider_for_devices(self._register(), chosen)
            return open_graph(path, component, settings, None)
        onnxruntime.preload_dlls()
        providers: list[Any] = [(self.provider, chosen)]
        if not graphs:  # all nodes of a captured graph must be the provider's own
            providers += [] if self is CUDA else [(CUDA.provider, _cuda(gpu, False))]
            providers.append("CPUExecutionProvider")
        return open_graph(path, component, settings, providers)

    def _register(self) -> list[Any]:
        """The GPUs that the plug-in offers. Raises BackendError."""
        import onnxruntime

        try:
            plugin = importlib.import_module(self.plugin)
            if self.provider not in {each.ep_name for each in onnxruntime.get_ep_devices()}:
                onnxruntime.register_execution_provider_library(
                    plugin.get_ep_name(), plugin.get_library_path()
                )
            found = [each for each in onnxruntime.get_ep_devices() if each.ep_name == self.provider]
        except Exception as cause:  # a library that does not load fails in its own ways
            raise BackendError(f"onnxruntime cannot load the plug-in {self.plugin}: {cause}") from cause
        if not found:
            raise BackendError(f"the plug-in {self.plugin} offers no GPU here")
        return found


def _cuda(gpu: Gpu, graphs: bool) -> Options:
    return {
        "device_id": "0",
        "has_user_compute_stream": "1",
        "user_compute_stream": str(gpu.stream),
        "enable_cuda_graph": str(int(graphs)),
        # Shapes change, and an exhaustive search for each of them takes seconds.
        "cudnn_conv_algo_search": "HEURISTIC",
        "cudnn_conv_use_max_workspace": "1",
        "prefer_nhwc": "1",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
    }


def _tensorrt(gpu: Gpu, graphs: bool) -> Options:
    return {
        "device_id": "0",
        "has_user_compute_stream": "1",
        "user_compute_stream": str(gpu.stream),
        "trt_cuda_graph_enable": str(int(graphs)),
    }


def _rtx(gpu: Gpu, graphs: bool) -> Options:
    return {"user_compute_stream": str(gpu.stream), "enable_cuda_graph": str(int(graphs))}


CUDA = OrtGpuDriver("CUDAExecutionProvider", _cuda)
TENSORRT = OrtGpuDriver("TensorrtExecutionProvider", _tensorrt)
"""Compiles when a shape is first run, which takes minutes. Needs TensorRT 10."""
TENSORRT_RTX = OrtGpuDriver("NvTensorRTRTXExecutionProvider", _rtx, "onnxruntime_ep_nv_tensorrt_rtx")
"""Compiles when a shape is first run, which takes seconds."""


class OrtCudaSession:
    """See Session.

    Steps are enqueued on the GPU's stream without waiting, and captured as a CUDA graph for each binding
    where ONNX Runtime can (`captures`); it cannot for graphs of which it places nodes on the CPU.
    """

    def __init__(
        self, path: Path, component: Component, gpu: Gpu, driver: OrtGpuDriver, *, lazy: bool = False
    ) -> None:
        self.precision = component.precision
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.outputs}
        self.memory: Memory = CudaMemory(gpu)
        self.captures = True
        self._gpu = gpu
        self._numbers = itertools.count()
        self._opened = Reopened(lambda: self._open(path, component, driver), lazy=lazy)

    def _open(self, path: Path, component: Component, driver: OrtGpuDriver) -> Any:
        # What is allocated while another thread captures a graph would break that.
        with self._gpu.exclusive:
            return self._open_alone(path, component, driver)

    def _open_alone(self, path: Path, component: Component, driver: OrtGpuDriver) -> Any:
        if self.captures:
            try:
                return driver.open_graph(path, component, self._gpu, graphs=True)
            except BackendError:
                self.captures = False
        return driver.open_graph(path, component, self._gpu, graphs=False)

    def bind(self, tensors: Mapping[str, Tensor]) -> OrtCudaBinding:
        """See Session.bind."""
        session = self._opened.get()
        check_tensors(self.inputs, self.outputs, tensors)
        binding = bind_addresses(session, self.inputs, tensors, "cuda")
        number = next(self._numbers) if self.captures else -1
        return OrtCudaBinding(session, binding, tensors, self._gpu, number)

    def unload(self) -> None:
        """See Session.unload."""
        self._opened.unload()

    def close(self) -> None:
        """See Session.close."""
        self._opened.close()


def _release(session: Any, number: int) -> None:
    """Let go of a captured graph, if there is one, and if this onnxruntime can."""
    with suppress(Exception):
        session.release_captured_graph(number)


class OrtCudaBinding:
    """See Binding. `number` tells its captured graph from others; -1 captures none."""

    def __init__(
        self, session: Any, binding: Any, tensors: Mapping[str, Tensor], gpu: Gpu, number: int
    ) -> None:
        import onnxruntime

        self._tensors = dict(tensors)  # their memory must live as long as we do
        self._session, self._binding, self._gpu = session, binding, gpu
        self._options: Any = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(number))
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if number >= 0:  # or the graphs of every shape that ever was would stay on the device
            weakref.finalize(self, _release, session, number)

    def run(self) -> None:
        """See Binding.run."""
        try:
            with self._gpu.exclusive:
                self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise BackendError(f"onnxruntime failed: {error}") from error
