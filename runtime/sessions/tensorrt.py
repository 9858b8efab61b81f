"""TensorRT and TensorRT-RTX on an NVIDIA GPU, one implementation for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from allaprima.bundle import BackendError, Component, EngineFile, RequestError, TensorSpec, nearest
from allaprima.runtime.cuda import CudaMemory, Gpu, Graph
from allaprima.runtime.memory import Memory, Tensor
from allaprima.runtime.session import check_names, check_tensors
from allaprima.runtime.sessions.tensorrt_api import (
    Context,
    Engine,
    RtxModule,
    RtxRuntime,
    RtxRuntimeConfig,
    Runtime,
    TensorrtModule,
)


class TensorrtSession:
    """See Session.

    Args:
        plans: engines of the component, each loaded when a binding first needs one of its profiles.
        component: as in the manifest.
        gpu: where to run.
        module: `tensorrt` or `tensorrt_rtx`.
        memory_limit: bytes of device memory that a plan which can stream its weights keeps below. What does
            not fit stays in the host's memory and is copied with every run.
    """

    def __init__(
        self,
        plans: Sequence[EngineFile],
        component: Component,
        gpu: Gpu,
        module: TensorrtModule,
        *,
        memory_limit: int | None = None,
    ) -> None:
        self.precision = component.precision
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.outputs}
        self.memory: Memory = CudaMemory(gpu)
        self._plans: Sequence[EngineFile] | None = plans
        self._name = component.graph
        self._gpu = gpu
        self._limit = memory_limit
        self._module: TensorrtModule = module
        self._log = Log()
        self._runtime: Runtime = module.Runtime(self._log.listener(module))
        self._engines: dict[Path, Engine] = {}

    def bind(self, tensors: Mapping[str, Tensor]) -> TensorrtBinding:
        """See Session.bind. RequestError for shapes that no plan serves, naming the nearest."""
        if self._plans is None:
            raise BackendError("the session is closed")
        extents = check_tensors(self.inputs, self.outputs, tensors)
        for plan in self._plans:
            for index, profile in enumerate(plan.profiles):
                if profile.serves(extents):
                    with self._gpu.exclusive:
                        context = self._context(plan.path, index, tensors)
                    return TensorrtBinding(context, tensors, self._gpu, self._log)
        raise self._unserved(extents)

    def unload(self) -> None:
        """See Session.unload."""
        with self._gpu.exclusive:
            self._engines.clear()

    def close(self) -> None:
        """See Session.close."""
        self._plans = None
        self.unload()

    def _unserved(self, extents: Mapping[str, int]) -> RequestError:
        profiles = [profile for plan in self._plans or () for profile in plan.profiles]
        near = nearest(profiles, extents)
        asked = ", ".join(f"{axis} {extents[axis]}" for axis in (near.extents if near else extents))
        return RequestError(
            f"no engine of {self._name} was built for {asked}; the nearest is for "
            f"{near.words() if near else 'nothing'}: allaprima build with --shapes and --batch"
        )

    def _engine(self, path: Path) -> Engine:
        """The engine of a plan, loaded if it is not. Raises BackendError with TensorRT's own words."""
        if path not in self._engines:
            self._log.clear()
            plan = path.read_bytes()
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                why = self._diagnose(plan) or self._log.words()
                raise BackendError(f"{path} cannot be loaded: {why}. Build it again")
            names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
            check_names([*self.inputs, *self.outputs], names, str(path))
            self._stream(engine, len(plan))
            self._engines[path] = engine
        return self._engines[path]

    def _stream(self, engine: Engine, size: int) -> None:
        """Before there is a context: let weights that do not fit into the limit stay with the host."""
        if self._limit is None or not (streamable := engine.streamable_weights_size):
            return
        engine.weight_streaming_budget_v2 = 0  # the need for scratch memory depends on it
        rest = size - streamable + engine.device_memory_size_v2 + engine.weight_streaming_scratch_memory_size
        engine.weight_streaming_budget_v2 = max(0, min(streamable, self._limit - rest))

    def _diagnose(self, plan: bytes) -> str:
        """What TensorRT-RTX has against a plan, from its header; "" if it is something else, or TensorRT."""
        if not hasattr(self._module, "EngineInvalidityDiagnostics"):
            return ""
        module, runtime = cast(RtxModule, self._module), cast(RtxRuntime, self._runtime)
        diagnostics = module.EngineInvalidityDiagnostics
        _, found = runtime.get_engine_validity(plan[: runtime.engine_header_size])
        words = {
            diagnostics.MALFORMED_ENGINE: "it is damaged",
            diagnostics.VERSION_MISMATCH: "it is of another version of TensorRT-RTX",
            diagnostics.UNSUPPORTED_CC: "it was built for other compute capabilities than this GPU's",
            diagnostics.OLD_CUDA_DRIVER: "the NVIDIA driver is too old for it",
            diagnostics.OLD_CUDA_RUNTIME: "the CUDA runtime is too old for it",
            diagnostics.INSUFFICIENT_GPU_MEMORY: "the GPU has too little memory for it",
        }
        return ", ".join(text for bit, text in words.items() if found & int(bit))

    def _context(self, path: Path, profile: int, tensors: Mapping[str, Tensor]) -> Context:
        """A context with profile, shapes and addresses in place, but no activation memory yet."""
        engine = self._engine(path)
        self._log.clear()
        strategy = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        context = engine.create_execution_context(self._settings(engine, strategy))
        if context is None:
            raise BackendError(f"{path}: no execution context: {self._log.words()}")
        ready = context.set_optimization_profile_async(profile, self._gpu.stream)
        for name in self.inputs:
            ready = ready and context.set_input_shape(name, tensors[name].array.shape)
        for name, tensor in tensors.items():
            ready = ready and context.set_tensor_address(name, tensor.address)
        if not ready or context.infer_shapes():
            raise BackendError(f"{path} refuses its shapes: {self._log.words()}")
        return context

    def _settings(self, engine: Engine, strategy: Any) -> Any:
        """What a context is made from. RTX compiles for its shapes before the first run, not behind it."""
        if not hasattr(self._module, "DynamicShapesKernelSpecializationStrategy"):
            return strategy
        module = cast(RtxModule, self._module)
        settings = cast(RtxRuntimeConfig, engine.create_runtime_config())
        settings.set_execution_context_allocation_strategy(strategy)
        eager = module.DynamicShapesKernelSpecializationStrategy.EAGER
        settings.dynamic_shapes_kernel_specialization_strategy = eager
        return settings


class TensorrtBinding:
    """See Binding.

    The first run is an ordinary one, in which TensorRT does what is left to do for the shapes; the second is
    captured as a CUDA graph, and later ones launch that. The scratch area is shared by all bindings of the
    GPU; when it has moved, the graph is captured again.
    """

    def __init__(self, context: Context, tensors: Mapping[str, Tensor], gpu: Gpu, log: Log) -> None:
        self._context, self._gpu, self._log = context, gpu, log
        self._tensors = dict(tensors)  # their memory must live as long as we do
        self._need = context.update_device_memory_size_for_shapes()
        self._scratch: int | None = None
        self._graph: Graph | None = None
        self._warm, self.captures = False, True

    def run(self) -> None:
        """See Binding.run."""
        with self._gpu.exclusive:
            self._place()
            if self._graph is None and self._warm and self.captures:
                self._graph = self._gpu.capture(self._context.execute_async_v3)
                self.captures = self._graph is not None
            if self._graph is not None:
                self._graph.launch()
                return
            self._log.clear()
            if not self._context.execute_async_v3(self._gpu.stream):
                raise BackendError(f"TensorRT failed: {self._log.words()}")
            self._warm = True

    def _place(self) -> None:
        address = self._gpu.scratch(self._need)
        if address != self._scratch:
            self._context.set_device_memory(address, self._need)
            self._scratch, self._graph, self._warm = address, None, False


class Log:
    """The last that TensorRT said that was a warning or worse; its calls return False or None, no reasons."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def listener(self, module: TensorrtModule) -> Any:
        """A logger of the module that tells us."""
        lines, bad = self._lines, (module.ILogger.Severity.INTERNAL_ERROR, module.ILogger.Severity.ERROR)

        base: Any = module.ILogger

        class Listener(base):  # type: ignore[misc]
            def log(self, severity: Any, msg: str) -> None:
                if severity in bad and len(lines) < 8:
                    lines.append(msg)

        return Listener()

    def clear(self) -> None:
        """Forget what was said."""
        self._lines.clear()

    def words(self) -> str:
        """What was said since, in one line."""
        return "; ".join(line.strip().replace("\n", " ") for line in self._lines[:2]) or "it does not say why"
