"""How each kind of backend compiles and verifies: the ones that run here anyway, and the TensorRT family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from allaprima.bundle import (
    BackendError,
    Bundle,
    EngineFile,
    EngineKey,
    Profile,
    RequestError,
    engine_key,
)
from allaprima.engine.options import AMPERE_AND_NEWER, Options
from allaprima.engine.shapes import Size, fixed_profiles, plan_profiles
from allaprima.engine.tensorrt import build_plan
from allaprima.engine.timing import timing_cache
from allaprima.engine.verify import measure_error, open_reference
from allaprima.runtime.backends import choose, compile_engine, fixes, key_of, open_session
from allaprima.runtime.cuda import current_device, default_gpu
from allaprima.runtime.flavours import FLAVOURS, load, version
from allaprima.runtime.sessions.tensorrt import TensorrtSession

MOST_FIXED = 2
"""Sizes that a backend which compiles for all shapes may also compile for alone."""


@dataclass(frozen=True)
class Job:
    """One engine to be built: of a component, for some shapes (none: all of the graph's)."""

    component: str
    profiles: tuple[Profile, ...] = ()


class Toolchain(Protocol):
    """Compiles the components of one bundle for one backend."""

    stages: tuple[str, ...]

    def jobs(self) -> tuple[Job, ...]:
        """What is to be built, in order."""

    def key(self, job: Job) -> EngineKey:
        """What identifies the engine."""

    def compile(self, job: Job, folder: Path, enter: Callable[[str], None]) -> Path:
        """Write the engine into `folder`, telling its stages; the file that a session loads."""

    def verify(self, job: Job, main: Path) -> float | None:
        """The engine's error (see `Engine.error`), None where it cannot run here; BuildError if too large."""


class Native:
    """A backend that runs on this machine and compiles for all shapes at once, some also for one alone.

    Each fixed shape holds another copy of the weights in memory once it is used, so there are at most
    `MOST_FIXED`.
    """

    stages: tuple[str, ...] = ("compile", "verify", "save")

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        precision: str | None,
        sizes: Sequence[Size],
        batch: tuple[int, int],
    ) -> None:
        self._bundle, self._backend, self._precision = bundle, backend, precision
        self._profiles: dict[str, tuple[Profile, ...]] = {}
        if not sizes and batch == (1, 1):
            return
        if not fixes(backend):
            raise RequestError(f"{backend} compiles one engine for all shapes: leave out sizes and batch")
        if batch[0] != batch[1] or len(sizes) > MOST_FIXED:
            raise RequestError(
                f"{backend} compiles for all shapes, and besides for at most {MOST_FIXED} sizes in one batch"
            )
        self._profiles = fixed_profiles(bundle, sizes, batch[0])

    def jobs(self) -> tuple[Job, ...]:
        """See Toolchain."""
        return tuple(
            job
            for name in self._bundle.manifest.components
            for job in (Job(name), *(Job(name, (profile,)) for profile in self._profiles.get(name, ())))
        )

    def key(self, job: Job) -> EngineKey:
        """See Toolchain."""
        return key_of(
            self._bundle, job.component, self._backend, precision=self._precision, profiles=job.profiles
        )

    def compile(self, job: Job, folder: Path, enter: Callable[[str], None]) -> Path:
        """See Toolchain."""
        enter("compile")
        described = self._bundle.component(job.component)
        graph = self._bundle.path(described.graph)
        precision, profile = self.key(job).precision, next(iter(job.profiles), None)
        return compile_engine(graph, described, folder, self._backend, precision=precision, profile=profile)

    def verify(self, job: Job, main: Path) -> float | None:
        """See Toolchain."""
        described, precision = self._bundle.component(job.component), self.key(job).precision
        graph, file = self._bundle.path(described.graph), EngineFile(main, job.profiles)
        engine = open_session(graph, described, self._backend, precision=precision, engines=[file])
        reference = open_reference(self._bundle, job.component, self._backend)
        return measure_error(self._bundle, job.component, engine, reference, next(iter(job.profiles), None))


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
        self.profiles = plan_profiles(bundle, sizes, batch, options.chunks)
        if FLAVOURS[backend].ahead_of_time:
            self._options = options.for_targets(options.targets or AMPERE_AND_NEWER)
            self._device = "compute capability " + ", ".join(self._options.targets)
        else:
            self._options, self._device = options, str(current_device())
        for name, component in bundle.manifest.components.items():
            kept = precision == "fp16" and component.overflows_fp16
            if precision not in (None, "auto", component.precision) and not kept:
                raise BackendError(
                    f"{backend} compiles {name} in the precision it was exported in, {component.precision}, "
                    f"not in {precision}: export with --precision {precision}"
                )

    def jobs(self) -> tuple[Job, ...]:
        """See Toolchain."""
        return tuple(Job(name, profiles) for name, profiles in self.profiles.items())

    def key(self, job: Job) -> EngineKey:
        """See Toolchain."""
        return engine_key(
            self._bundle,
            job.component,
            backend=self._backend,
            backend_version=self._version,
            device=self._device,
            precision=self._bundle.component(job.component).precision,
            profiles=job.profiles,
            flags=self._options.flags(),
        )

    def compile(self, job: Job, folder: Path, enter: Callable[[str], None]) -> Path:
        """See Toolchain."""
        path = folder / "model.plan"
        if FLAVOURS[self._backend].ahead_of_time:
            path.write_bytes(self._build(job, None, enter))
        else:
            with timing_cache(folder, folder.parent, self._version, self._device) as timings:
                path.write_bytes(self._build(job, timings, enter))
        return path

    def _build(self, job: Job, timings: Path | None, enter: Callable[[str], None]) -> bytes:
        described = self._bundle.component(job.component)
        return build_plan(
            self._bundle.path(described.graph),
            described,
            job.profiles,
            self._backend,
            self._options,
            timings,
            enter,
        )

    def verify(self, job: Job, main: Path) -> float | None:
        """See Toolchain. Where it cannot run, only its header is checked, when it is built."""
        try:
            choose(self._backend)
        except BackendError:
            return None
        described, file = self._bundle.component(job.component), EngineFile(main, job.profiles)
        engine = TensorrtSession([file], described, default_gpu(), load(self._backend))
        reference = open_reference(self._bundle, job.component, self._backend)
        return measure_error(self._bundle, job.component, engine, reference, job.profiles[0])
