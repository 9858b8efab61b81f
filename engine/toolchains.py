"""How each kind of backend compiles and verifies: the ones that run here anyway, and the TensorRT family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from allaprima.bundle import BackendError, Bundle, EngineKey, RequestError, engine_key
from allaprima.engine.options import AMPERE_AND_NEWER, Options
from allaprima.engine.shapes import Size, plan_profiles
from allaprima.engine.tensorrt import build_plan
from allaprima.engine.timing import timing_cache
from allaprima.engine.verify import measure_error, open_reference
from allaprima.runtime.backends import choose, compile_engine, key_of, open_session
from allaprima.runtime.cuda import current_device, default_gpu
from allaprima.runtime.flavours import FLAVOURS, load, version
from allaprima.runtime.sessions.tensorrt import Plan, TensorrtSession


class Toolchain(Protocol):
    """Compiles the components of one bundle for one backend."""

    stages: tuple[str, ...]

    def key(self, component: str) -> EngineKey:
        """What identifies the engine."""

    def compile(self, component: str, folder: Path, enter: Callable[[str], None]) -> Path:
        """Write the engine into `folder`, telling its stages; the file that a session loads."""

    def verify(self, component: str, main: Path) -> float | None:
        """The engine's error (see `Engine.error`), None where it cannot run here; BuildError if too large."""


class Native:
    """A backend that runs on this machine, and compiles for all shapes at once."""

    stages: tuple[str, ...] = ("compile", "verify", "save")

    def __init__(self, bundle: Bundle, backend: str, precision: str | None, *, fixed: bool) -> None:
        self._bundle, self._backend, self._precision = bundle, choose(backend), precision
        if fixed:
            raise RequestError(
                f"{self._backend} compiles one engine for all shapes: leave out sizes, batch and options, "
                "which belong to tensorrt and tensorrt-rtx"
            )

    def key(self, component: str) -> EngineKey:
        """See Toolchain."""
        return key_of(self._bundle, component, self._backend, precision=self._precision)

    def compile(self, component: str, folder: Path, enter: Callable[[str], None]) -> Path:
        """See Toolchain."""
        enter("compile")
        described = self._bundle.component(component)
        graph = self._bundle.path(described.graph)
        precision = self.key(component).precision
        return compile_engine(graph, described, folder, self._backend, precision=precision)

    def verify(self, component: str, main: Path) -> float | None:
        """See Toolchain."""
        described, precision = self._bundle.component(component), self.key(component).precision
        graph = self._bundle.path(described.graph)
        engine = open_session(graph, described, self._backend, precision=precision, engines=[main])
        reference = open_reference(self._bundle, component, self._backend)
        return measure_error(self._bundle, component, engine, reference)


class TensorRT:
    """TensorRT or TensorRT-RTX: compiled for shapes, and for the GPU here or for compute capabilities."""

    stages: tuple[str, ...] = ("parse", "build", "verify", "save")

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        precision: str | None,
        sizes: Sequence[Size],
        batch: tuple[int, int],
        options: Options,
    ) -> None:
        self._bundle, self._backend = bundle, backend
        self._version = version(backend)
        options.check(backend)
        self.profiles = plan_profiles(bundle, sizes, batch)
        if FLAVOURS[backend].ahead_of_time:
            self._options = options.for_targets(options.targets or AMPERE_AND_NEWER)
            self._device = "compute capability " + ", ".join(self._options.targets)
        else:
            self._options, self._device = options, str(current_device())
        for name, component in bundle.manifest.components.items():
            if precision not in (None, "auto", component.precision):
                raise BackendError(
                    f"{backend} compiles {name} in the precision it was exported in, {component.precision}, "
                    f"not in {precision}: export with --precision {precision}"
                )

    def key(self, component: str) -> EngineKey:
        """See Toolchain."""
        return engine_key(
            self._bundle,
            component,
            backend=self._backend,
            backend_version=self._version,
            device=self._device,
            precision=self._bundle.component(component).precision,
            profiles=self.profiles[component],
            flags=self._options.flags(),
        )

    def compile(self, component: str, folder: Path, enter: Callable[[str], None]) -> Path:
        """See Toolchain."""
        path = folder / "model.plan"
        if FLAVOURS[self._backend].ahead_of_time:
            path.write_bytes(self._build(component, None, enter))
        else:
            with timing_cache(folder, folder.parent, self._version, self._device) as timings:
                path.write_bytes(self._build(component, timings, enter))
        return path

    def _build(self, component: str, timings: Path | None, enter: Callable[[str], None]) -> bytes:
        described = self._bundle.component(component)
        return build_plan(
            self._bundle.path(described.graph),
            described,
            self.profiles[component],
            self._backend,
            self._options,
            timings,
            enter,
        )

    def verify(self, component: str, main: Path) -> float | None:
        """See Toolchain. Where it cannot run, only its header is checked, when it is built."""
        try:
            choose(self._backend)
        except BackendError:
            return None
        profiles, described = self.profiles[component], self._bundle.component(component)
        engine = TensorrtSession([Plan(main, profiles)], described, default_gpu(), load(self._backend))
        reference = open_reference(self._bundle, component, self._backend)
        return measure_error(self._bundle, component, engine, reference, profiles[0])
