"""ONNX Runtime on an NVIDIA GPU: its CUDA and TensorRT providers, on our buffers, stream and graphs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import logging
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
CAPTURES = 128
"""Graphs that an InferenceSession captures at most: it keeps all of them for as long as it lives."""
_LOG = logging.getLogger("allaprima.runtime")


@dataclass(frozen=True)
class OrtGpuDriver(GpuDriver):
    """See backends.Driver. One for each of ONNX Runtime's providers for NVIDIA GPUs.

    `options` gives a provider's options for a GPU, with or without CUDA graphs. `library` is the part of its
    library's name that is its own; `plugin` the package that brings a provider which does not come with
    onnxruntime itself.
    """

    provider: str
    options: Callable[[Gpu, bool], Options]
    library: str = ""
    plugin: str = ""

    def version(self) -> str:
        """The version of onnxruntime; BackendError, or what its import raises, if it cannot be used."""
        default_gpu()  # first, since it fails faster than onnxruntime is imported
        import onnxruntime

        if self.plugin:
            self._register()
        elif self.provider not in onnxruntime.get_available_providers():
            raise BackendError(f"the installed onnxruntime {onnxruntime.__version__} has no {self.provider}")
        else:
            _load(self.library)
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
        """An onnxruntime.InferenceSession, with the CPU for what the provider leaves if `graphs` is off.

        Raises BackendError, also if it would run without the provider.
        """

        chosen, settings = self.options(gpu, graphs), session_options()
        if self.plugin:
            settings.add_provider_for_devices(self._register(), chosen)
            return open_graph(path, component, settings, None)
        _load(self.library)
        providers: list[Any] = [(self.provider, chosen)]
        if not graphs:  # all nodes of a captured graph must be the provider's own
            providers += [] if self is CUDA else [(CUDA.provider, _cuda(gpu, False))]
            providers.append("CPUExecutionProvider")
            settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        session = open_graph(path, component, settings, providers)
        if self.provider not in session.get_providers():  # it was left out, with a warning to a log at most
            raise BackendError(f"onnxruntime could not start its {self.provider} for {path}")
        return session

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


_NEEDED = (
    "libcudart.so.*",
    "libcublasLt.so.*",
    "libcublas.so.*",
    "libnvrtc.so.*",
    "libcufft.so.*",
    "libcudnn*.so.*",
)
"""Libraries of NVIDIA's wheels, what others need first. Loaded by path, they come before the system's."""


@functools.cache
def _load(library: str) -> None:
    """Load a provider's library, and those of NVIDIA's wheels that it needs, wherever they are installed.

    onnxruntime looks for those only beside itself, and runs on the CPU where one is missing. Raises
    BackendError naming it.
    """
    import onnxruntime

    found = importlib.util.find_spec("nvidia")
    roots = () if found is None else found.submodule_search_locations or ()
    for pattern in _NEEDED:
        for path in (path for root in roots for path in sorted(Path(root).glob(f"*/lib/{pattern}"))):
            with contextlib.suppress(OSError):  # what is missing is told below
                ctypes.CDLL(str(path))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        onnxruntime.preload_dlls()
    windows = sys.platform == "win32"
    name = f"onnxruntime_providers_{library}.dll" if windows else f"libonnxruntime_providers_{library}.so"
    try:
        ctypes.CDLL(str(Path(onnxruntime.__file__).parent / "capi" / name))
    except OSError as cause:
        raise BackendError(f"onnxruntime {onnxruntime.__version__} cannot load {name}: {cause}") from cause


def _left_out(session: Any, provider: str) -> str:
    """The nodes that a provider leaves to others, counted by operator; "" if onnxruntime cannot tell."""
    try:
        parts = session.get_provider_graph_assignment_info()
    except Exception:  # of a release that has no such call, or of a plug-in
        return ""
    left = Counter(node.op_type for part in parts if part.ep_name != provider for node in part.get_nodes())
    return ", ".join(f"{count} {name}" for name, count in left.most_common())


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


CUDA = OrtGpuDriver("CUDAExecutionProvider", _cuda, "cuda")
TENSORRT = OrtGpuDriver("TensorrtExecutionProvider", _tensorrt, "tensorrt")
"""Compiles when a shape is first run, which takes minutes. Needs TensorRT 10."""
TENSORRT_RTX = OrtGpuDriver("NvTensorRTRTXExecutionProvider", _rtx, plugin="onnxruntime_ep_nv_tensorrt_rtx")
"""Compiles when a shape is first run, which takes seconds."""


class OrtCudaSession:
    """See Session.

    Steps are enqueued on the GPU's stream without waiting. A binding that runs again is captured as a CUDA
    graph, where ONNX Runtime can.

    Attributes:
        captures: whether it can; not for a graph of which it leaves nodes to the CPU.
        obstacle: why not, and which nodes; empty if it can.
    """

    def __init__(
        self, path: Path, component: Component, gpu: Gpu, driver: OrtGpuDriver, *, lazy: bool = False
    ) -> None:
        self.precision = component.precision
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.outputs}
        self.memory: Memory = CudaMemory(gpu)
        self.captures, self.obstacle = True, ""
        self._gpu = gpu
        self._numbers: Iterator[int] = iter(())
        self._opened = Reopened(lambda: self._open(path, component, driver), lazy=lazy)

    def _open(self, path: Path, component: Component, driver: OrtGpuDriver) -> Any:
        with self._gpu.exclusive:
            self._numbers = iter(range(1, CAPTURES + 1))  # 0 is what runs that name no graph take
            if self.captures:
                try:
                    return driver.open_graph(path, component, self._gpu, graphs=True)
                except BackendError as cause:
                    obstacle = str(cause)
            session = driver.open_graph(path, component, self._gpu, graphs=False)
            if self.captures:
                nodes = _left_out(session, driver.provider) or "onnxruntime does not tell"
                self.captures, self.obstacle = False, f"{obstacle}; nodes that are not on the GPU: {nodes}"
                _LOG.warning("%s runs slower, without CUDA graphs: %s", component.graph, self.obstacle)
            return session

    def bind(self, tensors: Mapping[str, Tensor]) -> OrtCudaBinding:
        """See Session.bind."""
        with self._gpu.exclusive:
            if self.captures and not operator.length_hint(self._numbers):
                self._opened.unload()  # with its graphs, once nobody holds its bindings
            session = self._opened.get()
            check_tensors(self.inputs, self.outputs, tensors)
            binding = bind_addresses(session, self.inputs, tensors, "cuda")
            return OrtCudaBinding(
                session, binding, tensors, self._gpu, self._numbers if self.captures else None
            )

    def unload(self) -> None:
        """See Session.unload."""
        with self._gpu.exclusive:
            self._opened.unload()

    def close(self) -> None:
        """See Session.close."""
        with self._gpu.exclusive:
            self._opened.close()


class OrtCudaBinding:
    """See Binding.

    The first run is an ordinary one, since many bindings run but once; the second captures a graph, which
    takes the next of `numbers` for its name, and later ones launch it. With None, or none left, all are
    ordinary.
    """

    def __init__(
        self,
        session: Any,
        binding: Any,
        tensors: Mapping[str, Tensor],
        gpu: Gpu,
        numbers: Iterator[int] | None,
    ) -> None:
        self._tensors = dict(tensors)  # their memory must live as long as we do
        self._session, self._binding, self._gpu = session, binding, gpu
        self._numbers, self._runs = numbers, 0
        self._options = _run_options(-1)

    def run(self) -> None:
        """See Binding.run."""
        with self._gpu.exclusive:
            self._runs += 1
            if self._runs != 2 or not self._capture():
                self._run()

    def _capture(self) -> bool:
        """Run and capture a graph, if there is a number left; False if nothing was run."""
        number = None if self._numbers is None else next(self._numbers, None)
        if number is None:
            return False
        ordinary, self._options = self._options, _run_options(number)
        try:
            self._run()
        except BackendError as cause:  # the inputs are as before, so an ordinary run can make good for it
            _LOG.warning("steps run slower, without a CUDA graph: %s", cause)
            self._options = ordinary
            return False
        return True

    def _run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise BackendError(f"onnxruntime failed: {error}") from error


def _run_options(graph: int) -> Any:
    """Options of runs that capture and launch a graph of this number; -1 is none."""
    import onnxruntime

    options: Any = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
