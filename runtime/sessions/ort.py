"""ONNX Runtime on the CPU."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from allaprima.bundle import BackendError, Component, EngineFile, Profile, TensorSpec
from allaprima.runtime.footprint import Footprint, stored
from allaprima.runtime.memory import HOST, Memory, Tensor
from allaprima.runtime.session import check_names, check_tensors


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
    graph: Path,
    component: Component,
    *,
    precision: str | None,
    threads: int | None,
    engines: Sequence[EngineFile],
    memory_limit: int | None,
) -> OrtSession:
    """Load a graph, or the optimised graph among `engines`; `backends.open_session` says the rest."""
    _check_precision(graph, component, precision)
    path = engines[0].path if engines else _own(graph, component)
    return OrtSession(path, component, threads=threads, lazy=memory_limit is not None)


def footprint(
    graph: Path, component: Component, engines: Sequence[EngineFile], *, precision: str
) -> Footprint:
    """Measured: one copy of the weights; of fp16 one in fp32 beside it, of int8 one in what is computed.

    Of a quantized graph it widens the weights, and keeps both.
    """
    weights = stored(engines[0].path) if engines else stored(_own(graph, component), component)
    if component.quantization is not None:
        weights *= 6
    elif component.weights is not None:
        weights *= 2
    elif component.precision == "fp16":
        weights *= 3
    return Footprint(weights, weights)


def compile_engine(
    graph: Path, component: Component, folder: Path, *, precision: str, profile: Profile | None
) -> Path:
    """Write the graph as ONNX Runtime optimises it into `folder`; `backends.compile_engine` says the rest."""
    import onnxruntime

    _check_precision(graph, component, precision)
    path = folder / "model.onnx"
    options = session_options()
    _spare_weights(options, component)
    options.optimized_model_filepath = str(path)
    # The next level rearranges weights for this processor's vectors; loading does that in any case.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "model.data")
    try:
        onnxruntime.InferenceSession(_own(graph, component), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(f"onnxruntime cannot compile {graph}: {error}") from error
    return path


def _own(graph: Path, component: Component) -> Path:
    """The graph that computes in float32, where the component's own does so in bf16."""
    return graph if component.float32_graph is None else graph.with_name(Path(component.float32_graph).name)


def _spare_weights(options: Any, component: Component) -> None:
    """Keep weights as small in memory as they are stored, and what is computed with them in float.

    Those in bf16 are widened by each run, one after the other, and stay in their file until then: folded,
    they would take twice the memory. Those in int8 go through kernels that would otherwise round the other
    factor to int8 as well.
    """
    if component.float32_graph is not None:
        options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
        options.enable_cpu_mem_arena = False  # it would keep the widened weights
    if component.weights is not None and component.quantization is None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")


def _check_precision(graph: Path, component: Component, precision: str | None) -> None:
    if component.float32_graph is not None and precision in (None, component.precision, "fp32"):
        return
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
    """See Session. `lazy`: nothing is loaded before the first binding.

    `spinning` lets threads poll for work during a run: faster alone, a nuisance to neighbours. Between runs
    they never do, since another component's session wants the cores then.
    """

    memory: Memory = HOST

    def __init__(
        self,
        path: Path,
        component: Component,
        *,
        threads: int | None = None,
        spinning: bool = True,
        lazy: bool = False,
    ) -> None:
        options = session_options(threads)
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.add_session_config_entry("session.force_spinning_stop", "1")
        _spare_weights(options, component)
        self.precision = component.precision if component.float32_graph is None else "fp32"
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.outputs}
        self._opened = Reopened(
            lambda: open_graph(path, component, options, ["CPUExecutionProvider"]), lazy=lazy
        )

    def bind(self, tensors: Mapping[str, Tensor]) -> OrtBinding:
        """See Session.bind."""
        session = self._opened.get()
        check_tensors(self.inputs, self.outputs, tensors)
        return OrtBinding(session, bind_addresses(session, self.inputs, tensors, "cpu"), tensors)

    def unload(self) -> None:
        """See Session.unload."""
        self._opened.unload()

    def close(self) -> None:
        """See Session.close."""
        self._opened.close()


class Reopened:
    """An onnxruntime.InferenceSession that is opened at once, and again when it is needed after `unload`.

    `lazy` leaves out the first time.
    """

    def __init__(self, opens: Callable[[], Any], *, lazy: bool = False) -> None:
        self._opens: Callable[[], Any] | None = opens
        self._session = None if lazy else opens()

    def get(self) -> Any:
        """The session. Raises BackendError after `close`, or if it cannot be opened again."""
        if self._opens is None:
            raise BackendError("the session is closed")
        if self._session is None:
            self._session = self._opens()
        return self._session

    def unload(self) -> None:
        """Let go of it until it is needed."""
        self._session = None

    def close(self) -> None:
        """Let go of it for good."""
        self._opens = self._session = None


class OrtBinding:
    """See Binding."""

    def __init__(self, session: Any, binding: Any, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)  # the bound addresses are theirs, so they must live as long as we do
        self._session = session
        self._binding = binding

    def run(self) -> None:
        """See Binding.run."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(f"onnxruntime failed: {error}") from error


def session_options(threads: int | None = None) -> Any:
    """Options of every session."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures come as exceptions; they need not be logged as well
    options.intra_op_num_threads = threads or 0
    return options


def open_graph(path: Path, component: Component, options: Any, providers: list[Any] | None) -> Any:
    """An onnxruntime.InferenceSession with the tensors of the manifest. Raises BackendError.

    `providers` None leaves them to the options.
    """
    import onnxruntime

    try:
        # Without its own idea of what to do instead: it would print, and take the CPU.
        session = onnxruntime.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise BackendError(f"onnxruntime cannot load {path}: {error}") from error
    sides = (component.inputs, session.get_inputs()), (component.outputs, session.get_outputs())
    for specs, nodes in sides:
        check_names([spec.name for spec in specs], [node.name for node in nodes], str(path))
    return session


def bind_addresses(
    session: Any, inputs: Mapping[str, TensorSpec], tensors: Mapping[str, Tensor], device: str
) -> Any:
    """An IOBinding to the addresses of tensors on a device, "cpu" or "cuda". Raises BackendError."""
    try:
        binding = session.io_binding()
        for name, tensor in tensors.items():
            bind = binding.bind_input if name in inputs else binding.bind_output
            bind(name, device, 0, tensor.array.dtype, tensor.array.shape, tensor.address)
    except Exception as error:
        raise BackendError(f"onnxruntime cannot bind its tensors on {device}: {error}") from error
    return binding
