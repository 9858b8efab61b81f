"""OpenVINO on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allaprima.bundle import BackendError, Component, EngineFile, Profile, RequestError, TensorSpec
from allaprima.runtime.footprint import Footprint, stored
from allaprima.runtime.memory import HOST, Memory, Tensor, on_host
from allaprima.runtime.session import check_names, check_tensors
from allaprima.runtime.sessions.openvino_weights import widen

SMALL = 16
"""Latents of up to this size may be a single token where a UNet of at most five levels is deepest."""
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def version() -> str:
    """The version of the driver package; whatever its import raises if it cannot be used."""
    import openvino

    return str(openvino.__version__).partition("-")[0]


def precisions() -> tuple[str, ...]:
    """What it can compute in on this machine, the default first.

    Only bf16 has matrix units on CPUs as a rule; where it is offered it is several times faster than fp32.
    fp16 is offered on request: without matrix units for it, it is slower than fp32.
    """
    offered = _core_capabilities()
    return ("bf16",) * ("BF16" in offered) + ("fp32",) + ("fp16",) * ("FP16" in offered)


def converts() -> bool:
    """A graph runs in any of these precisions, whatever its weights are stored in."""
    return True


def device() -> str:
    """The processor's name and what of it the plugin uses."""
    return " ".join([_core().get_property("CPU", "FULL_DEVICE_NAME").strip(), *sorted(_core_capabilities())])


def _core_capabilities() -> list[str]:
    return list(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def open_session(
    graph: Path,
    component: Component,
    *,
    precision: str | None,
    threads: int | None,
    engines: Sequence[EngineFile],
    memory_limit: int | None,
) -> OpenvinoSession:
    """Compile a graph, or import compiled models; `backends.open_session` says the rest."""
    chosen = precision or precisions()[0]
    if chosen not in precisions():
        raise BackendError(
            f"openvino cannot compute in {chosen} on this CPU, only in {', '.join(precisions())}"
        )

    def load(engine: Path | None) -> Any:
        try:
            if engine is None:
                return compile_graph(graph, component, precision=chosen, threads=threads)
            return import_engine(engine, _properties(chosen, threads))
        except Exception as error:
            raise BackendError(f"openvino cannot load {engine or graph}: {error}") from error

    models = [Model(file.profiles, functools.partial(load, file.path)) for file in engines]
    if all(file.profiles for file in engines):
        models.append(Model((), functools.partial(load, None)))
    return OpenvinoSession(
        models, component, precision=chosen, where=str(graph), lazy=memory_limit is not None
    )


def footprint(
    graph: Path, component: Component, engines: Sequence[EngineFile], *, precision: str
) -> Footprint:
    """Measured: the mapped weights, and a copy in the order and the precision that the kernels want.

    Of an int8 denoiser that copy has more than int8.
    """
    weights = max((file.path.stat().st_size for file in engines), default=0) or stored(graph, component)
    widened = precision == "fp32" and component.precision != "fp32"
    count = weights * (3 if widened or component.quantization is not None else 2)
    return Footprint(count, count)


def import_engine(path: Path, properties: Mapping[str, Any]) -> Any:
    """A compiled model from its file, whose weights are mapped and not read.

    Reading it first would take longer than all the rest, and another copy of it in memory.
    """
    import openvino

    mapped = openvino.Tensor(np.memmap(path, np.uint8, "c"), shared_memory=True)
    compiled = _core().import_model(mapped, "CPU", dict(properties))
    compiled.mapped = mapped  # which must live as long
    return compiled


def compile_graph(
    graph: Path,
    component: Component,
    *,
    precision: str,
    threads: int | None,
    profile: Profile | None = None,
) -> Any:
    """The compiled model of an ONNX graph, for all shapes or the best of a profile, to be exported or run.

    Below fp32, a timestep sinusoid would be computed from a rounded phase: bf16 has 8 bits, so a timestep of
    981 becomes 980 and the phase is off by a radian. The plugin keeps in fp32 what lies between an output and
    the nearest matrix product, so making the sines and cosines outputs keeps their phases exact.
    """
    model = _core().read_model(graph)
    widen(model, precision)
    if profile is not None:
        model.reshape({spec.name: list(profile.shapes(spec)[1]) for spec in component.inputs})
    if precision != "fp32":
        waves = [node.output(0) for node in model.get_ops() if node.get_type_name() in ("Sin", "Cos")]
        if waves:
            model.add_outputs(waves)
    return _core().compile_model(model, "CPU", _properties(precision, threads))


def compile_engine(
    graph: Path, component: Component, folder: Path, *, precision: str, profile: Profile | None
) -> Path:
    """Write the compiled model of a graph into `folder`; `backends.compile_engine` says the rest."""
    path = folder / "model.blob"
    try:
        compiled = compile_graph(graph, component, precision=precision, threads=None, profile=profile)
        path.write_bytes(compiled.export_model().getbuffer())
    except OSError:
        raise
    except Exception as error:
        raise BackendError(f"openvino cannot compile {graph}: {error}") from error
    return path


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _properties(precision: str, threads: int | None) -> dict[str, Any]:
    properties: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        # Else what is multiplied with weights in int8 would be rounded to int8 as well.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    return properties if threads is None else {**properties, "INFERENCE_NUM_THREADS": threads}


@dataclass(frozen=True)
class Model:
    """A compiled model that is there when it is asked for, and the shapes it serves (none: all)."""

    profiles: tuple[Profile, ...]
    load: Callable[[], Any]

    def serves(self, extents: Mapping[str, int]) -> bool:
        """Whether it takes tensors of these extents."""
        return not self.profiles or any(profile.serves(extents) for profile in self.profiles)


class OpenvinoSession:
    """See Session.

    Of several models, a binding takes the first that serves its shapes. Each holds its own copy of the
    weights, so none is loaded before a binding needs it, but for an only one, unless `lazy`.
    """

    memory: Memory = HOST

    def __init__(
        self,
        models: Sequence[Model],
        component: Component,
        *,
        precision: str,
        where: str,
        lazy: bool = False,
    ) -> None:
        self.precision = precision
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.outputs}
        self._models: Sequence[Model] | None = models
        self._where = where
        self._compiled: dict[int, Any] = {}
        if len(models) == 1 and not lazy:
            self._load(0, models[0])

    def bind(self, tensors: Mapping[str, Tensor]) -> OpenvinoBinding:
        """See Session.bind."""
        if self._models is None:
            raise BackendError("the session is closed")
        extents = check_tensors(self.inputs, self.outputs, tensors)
        for index, model in enumerate(self._models):
            if model.serves(extents):
                compiled = self._load(index, model)
                if not model.profiles:
                    self._settle(compiled, extents)
                return OpenvinoBinding(compiled, tensors)
        raise RequestError(f"no engine of {self._where} was built for {extents}")

    def _settle(self, compiled: Any, extents: Mapping[str, int]) -> None:
        """Before the first run at a small size, run once at a larger one.

        OpenVINO 2026.4 makes the attention kernels of a dynamic graph for the first shape it sees. If that is
        a single token, as where a UNet is deepest in its smallest picture, every later shape is wrong too.
        """
        if not {"G", "H", "W"} <= extents.keys() or getattr(compiled, "settled", False):
            return  # only denoisers have such levels
        if max(extents["H"], extents["W"]) > SMALL:
            return
        larger = {**extents, "H": 2 * extents["H"], "W": 2 * extents["W"]}
        specs = (*self.inputs.values(), *self.outputs.values())
        arrays = {spec.name: np.zeros(spec.resolve(larger), spec.dtype) for spec in specs}
        OpenvinoBinding(compiled, on_host(arrays)).run()
        compiled.settled = True

    def _load(self, index: int, model: Model) -> Any:
        if index not in self._compiled:
            compiled = model.load()
            # A port answers to several names where the plugin elided the cast behind an input.
            taken = [
                next((name for name in self.inputs if name in port.names), port.any_name)
                for port in compiled.inputs
            ]
            check_names(self.inputs, taken, self._where)
            # Outputs beyond these are the ones that compile_graph added.
            found = {name for port in compiled.outputs for name in port.names}
            check_names(self.outputs, found & self.outputs.keys(), self._where)
            self._compiled[index] = compiled
        return self._compiled[index]

    def unload(self) -> None:
        """See Session.unload."""
        self._compiled.clear()

    def close(self) -> None:
        """See Session.close."""
        self._models = None
        self._compiled.clear()


class OpenvinoBinding:
    """See Binding."""

    def __init__(self, compiled: Any, tensors: Mapping[str, Tensor]) -> None:
        import openvino

        self._request = compiled.create_infer_request()
        # The request keeps addresses, the tensors keep the arrays, so both must live as long as we do.
        self._tensors = {
            name: openvino.Tensor(tensor.array, shared_memory=True) for name, tensor in tensors.items()
        }
        try:
            for name, shared in self._tensors.items():
                self._request.set_tensor(name, shared)
        except Exception as error:
            raise BackendError(f"openvino cannot bind '{name}': {error}") from error

    def run(self) -> None:
        """See Binding.run."""
        try:
            self._request.infer()
        except Exception as error:
            raise BackendError(f"openvino failed: {error}") from error
