"""Opening the components of a bundle, all in one way."""

from __future__ import annotations

from collections.abc import Callable

from allaprima.bundle import Bundle, EngineFile
from allaprima.runtime.backends import find_engines, footprint, open_session
from allaprima.runtime.footprint import Footprint
from allaprima.runtime.session import Session


class Opener:
    """A bundle with a backend and how it is used: see `backends.open_session`."""

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        *,
        precision: str | None = None,
        threads: int | None = None,
        memory_limit: int | None = None,
        watch: Callable[[str, Session], Session] | None = None,
    ) -> None:
        """`watch` is given each session as it is opened and returns the one to use."""
        self._bundle, self._backend, self._precision = bundle, backend, precision
        self._threads, self._limit, self._watch = threads, memory_limit, watch
        self._found: dict[str, tuple[EngineFile, ...]] = {}

    def open(self, role: str) -> Session:
        """A component's session, over the engines that the cache has. Raises BundleError or BackendError."""
        component = self._bundle.component(role)
        session = open_session(
            self._bundle.path(component.graph),
            component,
            self._backend,
            precision=self._precision,
            threads=self._threads,
            engines=self._engines(role),
            memory_limit=self._limit,
        )
        return session if self._watch is None else self._watch(role, session)

    def weigh(self, role: str) -> Footprint:
        """What a component takes: see `backends.footprint`."""
        component = self._bundle.component(role)
        return footprint(
            self._bundle.path(component.graph),
            component,
            self._backend,
            self._engines(role),
            precision=self._precision,
        )

    def _engines(self, role: str) -> tuple[EngineFile, ...]:
        """Looked for once: to find them is to hash them."""
        if role not in self._found:
            self._found[role] = find_engines(self._bundle, role, self._backend, precision=self._precision)
        return self._found[role]
