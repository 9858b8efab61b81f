"""Opening a component's plans with TensorRT or TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from allaprima.bundle import BackendError, Component, EngineFile, component_name
from allaprima.runtime import flavours
from allaprima.runtime.cuda import default_gpu
from allaprima.runtime.footprint import Footprint
from allaprima.runtime.sessions.gpu_driver import GpuDriver, check_precision
from allaprima.runtime.sessions.tensorrt import TensorrtSession


class TensorrtDriver(GpuDriver):
    """See backends.Loader; `name` is that of the backend."""

    def __init__(self, name: str) -> None:
        self.name = name

    def version(self) -> str:
        """The version of the module; BackendError if it is not installed, or does not run on this GPU."""
        found = default_gpu().device
        fitting = flavours.flavour_for(found.capability)
        if fitting is None or (fitting == "tensorrt" and self.name == "tensorrt-rtx"):
            raise BackendError(
                f"{self.name} does not run on {found.name}, compute capability {found.capability}: "
                f"use {f'{fitting} or ' if fitting else ''}ort-cuda"
            )
        return flavours.version(self.name)

    def serves(self, device: str) -> bool:
        """Whether an engine for `device` runs here. One of RTX may be for several compute capabilities."""
        if self.name == "tensorrt":
            return device == self.device()
        return default_gpu().device.capability in device.replace(",", " ").split()

    def open_session(
        self,
        graph: Path,
        component: Component,
        *,
        precision: str | None,
        threads: int | None,
        engines: Sequence[EngineFile],
        memory_limit: int | None,
    ) -> TensorrtSession:
        """Make ready to load engines; `backends.open_session` says the rest."""
        role = component_name(graph)
        check_precision(self.name, component, precision)
        if not engines:
            raise BackendError(
                f"{self.name} {self.version()} has no engine of {role} for {self.device()}: "
                f"allaprima build --backend {self.name}"
            )
        return TensorrtSession(
            engines, component, default_gpu(), flavours.load(self.name), memory_limit=memory_limit
        )

    def footprint(
        self, graph: Path, component: Component, engines: Sequence[EngineFile], *, precision: str
    ) -> Footprint:
        """The largest engine's size, nearly all of which is weights; what it can stream, it can leave out."""
        largest = max(engines, key=lambda file: file.path.stat().st_size, default=None)
        weights = 0 if largest is None else largest.path.stat().st_size
        return Footprint(weights, 0 if largest is not None and largest.streams else weights)


TENSORRT = TensorrtDriver("tensorrt")
TENSORRT_RTX = TensorrtDriver("tensorrt-rtx")
