"""What serving asks of TensorRT and TensorRT-RTX: their Python API, as far as a session uses it.

Both modules come without types. A session is written against these protocols, and a test holds every member
and every argument name against the real bindings, so that a misspelled method fails there and not on a GPU.
The classes are those of the bindings' documentation; `COUNTERPARTS` says which is which. Streams and memory
are plain integers: a `cudaStream_t` and a device address.

Failures: nothing here raises unless it says so. `None`, `False` or a log line is all there is, so check every
result, and keep what the logger was told for the message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

Dims = Sequence[int]
"""A shape; -1 is an extent that is not known yet. Converts to `tuple`."""


class Severity(Protocol):
    """How bad a log line is; comparable with `<`, the worst first."""

    INTERNAL_ERROR: Any
    ERROR: Any
    WARNING: Any
    INFO: Any
    VERBOSE: Any


class Logger(Protocol):
    """Subclass `module.ILogger` and define `log`; call its `__init__` without arguments.

    It must outlive every runtime that was given it.
    """

    Severity: Severity

    def log(self, severity: Any, msg: str) -> None:
        """One line. Called from any thread, also while a call of ours is still running."""


class AllocationStrategies(Protocol):
    """Who provides the activation memory of a context."""

    STATIC: Any
    """The context, for the largest need of all profiles."""
    ON_PROFILE_CHANGE: Any
    """The context, for the present profile."""
    USER_MANAGED: Any
    """The caller, through `Context.set_device_memory`."""


class TensorIOModes(Protocol):
    """Which way a tensor goes."""

    NONE: Any
    """There is no tensor of that name."""
    INPUT: Any
    OUTPUT: Any


class DataTypes(Protocol):
    """Element types, as far as bundles have them at their edges."""

    FLOAT: Any
    HALF: Any
    BF16: Any
    INT64: Any
    INT32: Any
    UINT8: Any
    BOOL: Any


class RuntimeConfig(Protocol):
    """How a context is made."""

    def set_execution_context_allocation_strategy(self, strategy: Any, /) -> None:
        """One of `AllocationStrategies`."""


class Context(Protocol):
    """`IExecutionContext`: an engine with shapes, addresses and activation memory; one call at a time.

    The order: profile, input shapes, `infer_shapes`, memory, addresses, `execute_async_v3`. Before a graph is
    captured, one call must have run: it does what is left to do for the shapes.
    """

    @property
    def active_optimization_profile(self) -> int:
        """Index of the present profile, -1 if none was set."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Change the profile, which forgets all shapes and may copy weights on the stream."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """False if the shape is outside the profile."""

    def infer_shapes(self) -> list[str]:
        """Names of the tensors whose shapes are still missing, [] when all are known.

        Raises RuntimeError if the shapes contradict the graph.
        """

    def get_tensor_shape(self, name: str) -> Dims:
        """Of an output, once all inputs have theirs; -1 where unknown."""

    def update_device_memory_size_for_shapes(self) -> int:
        """Bytes of activation memory that the present shapes need, which may be less than the profile's."""

    def set_device_memory(self, memory: int, size: int) -> None:
        """Use `size` bytes at `memory` (aligned to 256) for activations, under USER_MANAGED.

        Contexts that never run at the same time may share it.
        """

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Where an input is read or an output written from now on; False if there is no such tensor."""

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Enqueue one computation; False if it could not be, or not while the stream is being captured."""

    def set_aux_streams(self, aux_streams: list[int]) -> None:
        """Streams for what runs beside the main one; `Engine.num_aux_streams` says how many are used."""


class Engine(Protocol):
    """`ICudaEngine`: a loaded plan with its weights on the device."""

    @property
    def num_io_tensors(self) -> int:
        """How many inputs and outputs."""

    @property
    def num_optimization_profiles(self) -> int:
        """At least 1."""

    @property
    def num_aux_streams(self) -> int:
        """Most auxiliary streams that a context uses."""

    @property
    def refittable(self) -> bool:
        """Whether the weights may be changed."""

    @property
    def streamable_weights_size(self) -> int:
        """Bytes of weights that can be streamed, 0 if it was not built for that."""

    @property
    def device_memory_size_v2(self) -> int:
        """Bytes of activation memory that the largest of all profiles needs, with the present budget."""

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        """Bytes of device memory that streaming itself takes, with the present budget."""

    weight_streaming_budget_v2: int
    """Bytes of the streamable weights that stay on the device: all of them, unless set before any context."""

    def get_tensor_name(self, index: int) -> str:
        """The name of an input or output, by its index."""

    def get_tensor_mode(self, name: str) -> Any:
        """One of `TensorIOModes`."""

    def get_tensor_dtype(self, name: str) -> Any:
        """One of `DataTypes`."""

    def get_tensor_shape(self, name: str) -> Dims:
        """As built: -1 for every axis that a profile spans."""

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Sequence[Dims]:
        """Smallest, best and largest shape of an input."""

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        """Bytes of activation memory that the largest shapes of a profile need."""

    def create_execution_context(self, config: Any, /) -> Context | None:
        """A context, from a member of `AllocationStrategies` or a `RuntimeConfig`.

        None if memory is short. TensorRT-RTX compiles its kernels here.
        """

    def create_runtime_config(self) -> RuntimeConfig:
        """Settings for the contexts of this engine."""


class Runtime(Protocol):
    """`Runtime`: loads plans for the current device. It must outlive its engines."""

    def deserialize_cuda_engine(self, plan: bytes | memoryview, /) -> Engine | None:
        """None if the plan is of another version or device, or damaged; the logger knows which."""


MakeRuntime = Callable[[Any], Runtime]
MakeLogger = type[Any]


class TensorrtModule(Protocol):
    """What the two modules have in common."""

    __version__: str
    ILogger: MakeLogger
    Runtime: MakeRuntime
    """Takes a logger. Raises TypeError for anything else."""
    ExecutionContextAllocationStrategy: AllocationStrategies
    TensorIOMode: TensorIOModes
    DataType: DataTypes


# Only TensorRT-RTX.


class RuntimeCache(Protocol):
    """`IRuntimeCache`: kernels that were compiled on this device, to be kept on disk between runs."""

    def serialize(self) -> Any:
        """Everything compiled so far, as an object with the buffer protocol."""

    def deserialize(self, blob: bytes, /) -> bool:
        """False if it is of another version, device or driver. A CUDA context must be current."""


class SpecializationStrategies(Protocol):
    """When kernels are compiled for the shapes at hand."""

    LAZY: Any
    """In the background, running general ones meanwhile: times vary. The default."""
    EAGER: Any
    """At the first call with these shapes."""
    NONE: Any
    """Never."""


class CudaGraphStrategies(Protocol):
    """Whether a context captures graphs by itself."""

    DISABLED: Any
    WHOLE_GRAPH_CAPTURE: Any


class RtxRuntimeConfig(RuntimeConfig, Protocol):
    """`IRuntimeConfig` of TensorRT-RTX."""

    dynamic_shapes_kernel_specialization_strategy: Any
    """One of `SpecializationStrategies`."""
    cuda_graph_strategy: Any
    """One of `CudaGraphStrategies`."""

    def create_runtime_cache(self) -> RuntimeCache:
        """An empty cache, which several engines may share."""

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        """Use this cache, from the next context on."""


class RtxContext(Context, Protocol):
    """`IExecutionContext` of TensorRT-RTX."""

    def is_stream_capturable(self, stream: int) -> bool:
        """Whether `execute_async_v3` may be captured, with the shapes that are set."""


class RtxRuntime(Runtime, Protocol):
    """`Runtime` of TensorRT-RTX."""

    @property
    def engine_header_size(self) -> int:
        """How many bytes of a plan `get_engine_validity` needs."""

    def get_engine_validity(self, buffer: bytes, /) -> tuple[Any, int]:
        """Whether a plan would load (`EngineValidities`), and the values of `EngineDiagnostics` or-ed."""


class EngineValidities(Protocol):
    """Whether a plan would load."""

    VALID: Any
    SUBOPTIMAL: Any
    INVALID: Any


class EngineDiagnostics(Protocol):
    """Why it would not; `int()` of each is one bit."""

    VERSION_MISMATCH: Any
    UNSUPPORTED_CC: Any
    OLD_CUDA_DRIVER: Any
    OLD_CUDA_RUNTIME: Any
    INSUFFICIENT_GPU_MEMORY: Any
    MALFORMED_ENGINE: Any
    CUDA_ERROR: Any


class RtxModule(TensorrtModule, Protocol):
    """What `tensorrt_rtx` has besides."""

    DynamicShapesKernelSpecializationStrategy: SpecializationStrategies
    CudaGraphStrategy: CudaGraphStrategies
    EngineValidity: EngineValidities
    EngineInvalidityDiagnostics: EngineDiagnostics


COUNTERPARTS: dict[type[Any], str] = {
    Severity: "ILogger.Severity",
    Logger: "ILogger",
    AllocationStrategies: "ExecutionContextAllocationStrategy",
    TensorIOModes: "TensorIOMode",
    DataTypes: "DataType",
    RuntimeConfig: "IRuntimeConfig",
    Context: "IExecutionContext",
    Engine: "ICudaEngine",
    Runtime: "Runtime",
    TensorrtModule: "",
}
"""The class of both modules that each protocol describes; "" is the module itself."""
RTX_COUNTERPARTS: dict[type[Any], str] = {
    RuntimeCache: "IRuntimeCache",
    SpecializationStrategies: "DynamicShapesKernelSpecializationStrategy",
    CudaGraphStrategies: "CudaGraphStrategy",
    RtxRuntimeConfig: "IRuntimeConfig",
    RtxContext: "IExecutionContext",
    RtxRuntime: "Runtime",
    EngineValidities: "EngineValidity",
    EngineDiagnostics: "EngineInvalidityDiagnostics",
    RtxModule: "",
}
"""Those that only TensorRT-RTX has."""
