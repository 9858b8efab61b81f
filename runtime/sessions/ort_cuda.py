"""ONNX Runtime on an NVIDIA GPU: its CUDA provider, on our buffers, stream and graphs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allaprima.bundle import BackendError, Component, EngineFile, TensorSpec
from allaprima.runtime.cuda import CudaMemory, Gpu, default_gpu
from allaprima.runtime.memory import Memory, Tensor
from allaprima.runtime.session import check_tensors
from allaprima.runtime.sessions.ort import bind_addresses, open_graph, session_options

PROVIDER = "CUDAExecutionProvider"


def version() -> str:
    """The version of the driver package; whatever its import raises if it cannot be used."""
    default_gpu()  # first, since it fails faster than onnxruntime is imported
    import onnxruntime

    if PROVIDER not in onnxruntime.get_available_providers():
        raise BackendError(f"the installed onnxruntime {onnxruntime.__version__} is not the one for CUDA")
    return str(onnxruntime.__version__)


def precisions() -> tuple[str, ...]:
    """What it can compute in, fastest first; a graph runs in the one it was exported in."""
    return ("fp16", "bf16", "fp32")


def converts() -> bool:
    """A graph runs only in the precision that it was exported in."""
    return False


def device() -> str:
    """The GPU's name and compute capability."""
    return str(default_gpu().device)


def open_session(
    graph: Path,
    component: Component,
    *,
    precision: str | None,
    threads: int | None,
    engines: Sequence[EngineFile],
) -> OrtCudaSession:
    """Load a graph; `backends.open_session` says the rest."""
    if precision not in (None, component.precision):
        raise BackendError(
            f"onnxruntime runs a graph in the precision it was exported in, {component.precision}, not in "
            f"{precision}: export with --precision {precision}"
        )
    return OrtCudaSession(graph, component, default_gpu())


class OrtCudaSession:
    """See Session.

    Steps are enqueued on the GPU's stream without waiting, and captured as a CUDA graph for each binding
    where ONNX Runtime can (`captures`); it cannot for graphs of which it places nodes on the CPU.
    """

    def __init__(self, path: Path, component: Component, gpu: Gpu) -> None:
        import onnxruntime

        onnxruntime.preload_dlls()
        self.precision = component.precision
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.outputs}
        self.memory: Memory = CudaMemory(gpu)
        self.captures = True
        self._gpu = gpu
        self._numbers = itertools.count()
        try:
            self._session: Any = open_graph(path, component, session_options(), [self._provider()])
        except BackendError:
            self.captures = False
            providers = [self._provider(), "CPUExecutionProvider"]
            self._session = open_graph(path, component, session_options(), providers)

    def _provider(self) -> tuple[str, dict[str, str]]:
        options = {
            "device_id": "0",
            "has_user_compute_stream": "1",
            "user_compute_stream": str(self._gpu.stream),
            "enable_cuda_graph": str(int(self.captures)),
            # Shapes change, and an exhaustive search for each of them takes seconds.
            "cudnn_conv_algo_search": "HEURISTIC",
            "cudnn_conv_use_max_workspace": "1",
            "prefer_nhwc": "1",
            "use_tf32": "0",
            "arena_extend_strategy": "kSameAsRequested",
        }
        return PROVIDER, options

    def bind(self, tensors: Mapping[str, Tensor]) -> OrtCudaBinding:
        """See Session.bind."""
        if self._session is None:
            raise BackendError("the session is closed")
        check_tensors(self.inputs, self.outputs, tensors)
        binding = bind_addresses(self._session, self.inputs, tensors, "cuda")
        number = next(self._numbers) if self.captures else -1
        return OrtCudaBinding(self._session, binding, tensors, self._gpu, number)

    def close(self) -> None:
        """See Session.close."""
        self._session = None


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

    def run(self) -> None:
        """See Binding.run."""
        try:
            with self._gpu.exclusive:
                self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise BackendError(f"onnxruntime failed: {error}") from error
