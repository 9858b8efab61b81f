"""ONNX Runtime on the CPU."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from allaprima.bundle import BackendError, Component, TensorSpec
from allaprima.runtime.session import check_buffers, check_names


def version() -> str:
    """The version of the driver package; whatever its import raises if it cannot be used."""
    import onnxruntime

    return str(onnxruntime.__version__)


def precisions() -> tuple[str, ...]:
    """What it can compute in, fastest first; a graph runs in the one it was exported in."""
    return ("fp32", "fp16")


def converts() -> bool:
    """A graph runs only in the precision that it was exported in."""
    return False


def device() -> str:
    """The processor's architecture: engines hold no optimisation that depends on more."""
    return platform.machine()


def open_session(
    graph: Path, component: Component, *, precision: str | None, threads: int | None, engine: Path | None
) -> OrtSession:
    """Load a graph, or the optimised graph at `engine`; `backends.open_session` says the rest."""
    _check_precision(graph, component, precision)
    return OrtSession(engine or graph, component, threads=threads)


def compile_engine(graph: Path, component: Component, folder: Path, *, precision: str) -> Path:
    """Write the graph as ONNX Runtime optimises it into `folder`; `backends.compile_engine` says the rest."""
    import onnxruntime

    _check_precision(graph, component, precision)
    path = folder / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path)
    # The next level rearranges weights for this processor's vectors; loading does that in any case.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "model.data")
    try:
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(f"onnxruntime cannot compile {graph}: {error}") from error
    return path


def _check_precision(graph: Path, component: Component, precision: str | None) -> None:
    if component.precision not in precisions():
        raise BackendError(
            f"onnxruntime cannot run {graph.name} in {component.precision} on a CPU: "
            "use the backend openvino, or export with --precision fp16"
        )
    if precision not in (None, component.precision):
        raise BackendError(
            f"onnxruntime runs a graph in the precision it was exported in, {component.precision}, not in "
            f"{precision}: use the backend openvino, or export with --precision {precision}"
        )


class OrtSession:
    """See Session. `spinning` lets idle threads poll for work: faster alone, a nuisance to neighbours."""

    def __init__(
        self, path: Path, component: Component, *, threads: int | None = None, spinning: bool = True
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # failures come as exceptions; they need not be logged as well
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BackendError(f"onnxruntime cannot load {path}: {error}") from error
        self.precision = component.precision
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.outputs}
        check_names(self.inputs, [node.name for node in session.get_inputs()], str(path))
        check_names(self.outputs, [node.name for node in session.get_outputs()], str(path))
        self._session: Any = session

    def bind(self, buffers: Mapping[str, NDArray[Any]]) -> OrtBinding:
        """See Session.bind."""
        if self._session is None:
            raise BackendError("the session is closed")
        check_buffers(self.inputs, self.outputs, buffers)
        return OrtBinding(self._session, self.inputs, self.outputs, buffers)

    def close(self) -> None:
        """See Session.close."""
        self._session = None


class OrtBinding:
    """See Binding."""

    def __init__(
        self,
        session: Any,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        buffers: Mapping[str, NDArray[Any]],
    ) -> None:
        self._buffers = dict(buffers)  # the bound addresses are theirs, so they must live as long as we do
        self._session = session
        self._binding = session.io_binding()
        for name, array in self._buffers.items():
            bind = self._binding.bind_input if name in inputs else self._binding.bind_output
            bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(self) -> None:
        """See Binding.run."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(f"onnxruntime failed: {error}") from error
