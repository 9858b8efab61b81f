"""ONNX Runtime on the CPU."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from allaprima.bundle import BackendError, Component, EngineFile, Profile, TensorSpec
from allaprima.runtime.footprint import Footprint, stored
from allaprima.runtime.memory import HOST, Memory, Tensor, trim
from allaprima.runtime.session import check_names, check_tensors


def version() -> str:
    """The version of the driver package; whatever its import raises if it cannot be used."""
    import onnxruntime

    return str(onnxruntime.__version__)


def precisions() -> tuple[str, ...]:
    """What it can compute in, fastest first: few operators have kernels for fp16, the rest get casts."""
    return ("fp32", "fp16")


def converts() -> bool:
    """A graph runs only in the precisions that it was exported in."""
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
    chosen = _choose(graph, component, precision)
    path = engines[0].path if engines else _graph(graph, component, chosen)
    return OrtSession(path, component, precision=chosen, threads=threads, lazy=memory_limit is not None)


def footprint(
    graph: Path, component: Component, engines: Sequence[EngineFile], *, precision: str
) -> Footprint:
    """Measured: one copy of the weights, of 16 bits one in fp32 beside it, at least as long as it is loaded.

    Of int8 there is one in what is computed; a quantized graph is widened as a whole, and both are kept.
    """
    weights = stored(engines[0].path) if engines else stored(graph, component)
    if component.quantization is not None:
        weights *= 6
    elif component.weights is not None:
        weights *= 2
    elif precision == "fp16" or not (component.precision == "fp32" or engines or _streams(component)):
        weights *= 3
    return Footprint(weights, weights)


def compile_engine(
    graph: Path, component: Component, folder: Path, *, precision: str, profile: Profile | None
) -> Path:
    """Write the graph as ONNX Runtime optimises it into `folder`; `backends.compile_engine` says the rest."""
    import onnxruntime

    chosen = _choose(graph, component, precision)
    path = folder / "model.onnx"
    options = session_options()
    _spare_weights(options, component)
    options.optimized_model_filepath = str(path)
    # The next level rearranges weights for this processor's vectors; loading does that in any case.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "model.data")
    try:
        source = _graph(graph, component, chosen)
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(f"onnxruntime cannot compile {graph}: {error}") from error
    return path


def _choose(graph: Path, component: Component, precision: str | None) -> str:
    """What is computed; of a component that must not be in fp16, its own precision stands for float32."""
    able = [each for each in precisions() if each in component.precisions]
    if not able:
        raise BackendError(
            f"onnxruntime cannot run {graph.name} in {component.precision} on a CPU: "
            "use the backend openvino, or export with --precision fp16"
        )
    if precision is None or (component.overflows_fp16 and precision == component.precision):
        return able[0]
    if precision not in able:
        export = f", or export with --precision {precision}" if precision in precisions() else ""
        raise BackendError(
            f"onnxruntime computes {graph.name} in {' or '.join(able)} on a CPU, not in {precision}: "
            f"use the backend openvino{export}"
        )
    return precision


def _graph(graph: Path, component: Component, precision: str) -> Path:
    """The one of a component's graphs that computes in this precision."""
    if precision != "fp32" or component.float32_graph is None:
        return graph
    return graph.with_name(Path(component.float32_graph).name)


def _streams(component: Component) -> bool:
    """Whether each run widens the weights: those of a text encoder that overflows are most of the model."""
    text = any(spec.name == "input_ids" for spec in component.inputs)
    return component.widens and component.overflows_fp16 and text


def _spare_weights(options: Any, component: Component) -> None:
    """Keep large weights as small in memory as they are stored, and what is computed with them in float.

    Those in bf16 are widened by each run, one after the other, and stay in their file until then. Those in
    int8 go through kernels that would otherwise round the other factor to int8 as well.
    """
    if _streams(component):
        options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
        options.enable_cpu_mem_arena = False  # it would keep the widened weights
    if component.weights is not None and component.quantization is None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")


class OrtSession:
    """See Session. `precision` is that of the graph at `path`.

    `lazy`: nothing is loaded before the first binding. Threads poll for work during a run only: after it
    another component's session wants the cores.
    """

    memory: Memory = HOST

    def __init__(
        self,
        path: Path,
        component: Component,
        *,
        precision: str,
        threads: int | None = None,
        lazy: bool = False,
    ) -> None:
        options = session_options(threads)
        options.add_session_config_entry("session.force_spinning_stop", "1")
        _spare_weights(options, component)
        self.precision = precision
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.outputs}
        self._opened = Reopened(lambda: self._open(path, component, options), lazy=lazy)

    @staticmethod
    def _open(path: Path, component: Component, options: Any) -> Any:
        opened = open_graph(path, component, options, ["CPUExecutionProvider"])
        trim()  # the narrow copies of weights that were widened
        return opened

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
