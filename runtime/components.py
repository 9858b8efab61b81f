"""The components of a pipeline: sessions that are opened when they are needed, and held within a limit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from time import perf_counter
from weakref import WeakSet

from allaprima.bundle import BackendError, Bundle, RequestError, TensorSpec
from allaprima.runtime.footprint import Footprint, activations, show_bytes, stored
from allaprima.runtime.memory import Memory, Tensor, trim
from allaprima.runtime.result import MemoryUse
from allaprima.runtime.session import Binding, Session, check_tensors


class Components:
    """The sessions of a bundle's components by role.

    Without a limit they are the backend's own. With one, a session's weights are loaded when one of its
    bindings runs, after those of the least recently used others were let go of until they fit; a binding
    that lost its session gets it back by itself.
    """

    def __init__(
        self,
        sessions: Mapping[str, Session],
        *,
        opens: Callable[[str], Session] | None = None,
        limit: int | None = None,
        weigh: Callable[[str], Footprint] | None = None,
    ) -> None:
        """Take over sessions; `opens` opens others when they are needed, `weigh` says what a limit counts.

        `limit` in bytes needs `weigh`. Raises BackendError if a component can never fit.
        """
        self._opens, self._weigh = opens, weigh
        self._budget = None if limit is None else Budget(limit)
        self.sessions: dict[str, Session] = {}
        for role, session in sessions.items():
            self.sessions[role] = self._held(role, session)

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self._budget is not None

    def open(self, role: str) -> Session:
        """The session of a component that only some requests need, opened if it is not yet.

        Raises RequestError if this pipeline cannot, or BackendError.
        """
        if role not in self.sessions:
            if self._opens is None:
                raise RequestError(
                    f"this pipeline was made without a {role}, which the request needs: use Pipeline.open"
                )
            self.sessions[role] = self._held(role, self._opens(role))
        return self.sessions[role]

    def begin(self) -> None:
        """A request begins: what is reported counts from here."""
        if self._budget is not None:
            self._budget.begin()

    def report(self) -> MemoryUse | None:
        """What was done for the limit since `begin`; None if there is none."""
        return None if self._budget is None else self._budget.report()

    def unload(self) -> None:
        """Let go of all weights until the next run; what is bound keeps them, but not within a limit."""
        for session in self.sessions.values():
            session.unload()

    def close(self) -> None:
        """Let go of everything for good."""
        for session in self.sessions.values():
            session.close()
        self.sessions.clear()
        self._opens = None

    def _held(self, role: str, session: Session) -> Session:
        if self._budget is None:
            return session
        assert self._weigh is not None
        return HeldSession(role, session, self._weigh(role), self._budget)


def weigh_files(bundle: Bundle, role: str) -> Footprint:
    """What a component takes if nobody knows better: its files."""
    component = bundle.component(role)
    weights = stored(bundle.path(component.graph), component)
    return Footprint(weights, weights)


class Budget:
    """Which sessions hold their weights, and how much that is."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: OrderedDict[str, HeldSession] = OrderedDict()  # the most recently used last
        self._seconds = 0.0
        self.begin()

    def begin(self) -> None:
        """Forget what was done."""
        self._loaded: list[str] = []
        self._unloaded: list[str] = []
        self._needs = {role: session.held for role, session in self._held.items()}
        self._peak, self._seconds = self._total(), 0.0

    def report(self) -> MemoryUse:
        """What was done since `begin`."""
        moved = tuple(self._loaded), tuple(self._unloaded)
        return MemoryUse(self.limit, self._peak, dict(self._needs), *moved, self._seconds)

    def touch(self, session: HeldSession) -> None:
        """It is used now."""
        self._held.move_to_end(session.role)

    def admit(self, session: HeldSession, need: int, load: Callable[[], Binding]) -> Binding:
        """Make room for `need` more bytes of a session and load; least recently used others go first."""
        started = perf_counter()
        while self._total() + need > self.limit and (
            others := [other for other in self._held.values() if other is not session]
        ):
            others[0].unload()
        fresh = session.role not in self._held
        binding = load()
        self._held[session.role] = session
        self._held.move_to_end(session.role)
        if fresh:
            self._loaded.append(session.role)
        self._seconds += perf_counter() - started
        return binding

    def count(self, session: HeldSession) -> None:
        """Take note of what a session now holds."""
        self._needs[session.role] = max(session.held, self._needs.get(session.role, 0))
        self._peak = max(self._peak, self._total())

    def drop(self, session: HeldSession) -> None:
        """It holds nothing any more."""
        if self._held.pop(session.role, None) is not None:
            self._unloaded.append(session.role)

    def _total(self) -> int:
        return sum(session.held for session in self._held.values())


class HeldSession:
    """A session within a budget: see Session.

    Unlike others, its bindings let go of the weights when it does, and load them when they run.
    """

    def __init__(self, role: str, session: Session, footprint: Footprint, budget: Budget) -> None:
        """Raises BackendError if it does not fit at all."""
        self.role = role
        self.inputs: Mapping[str, TensorSpec] = session.inputs
        self.outputs: Mapping[str, TensorSpec] = session.outputs
        self.precision: str = session.precision
        self.memory: Memory = session.memory
        self._session, self._budget = session, budget
        self._least = footprint.least
        self._weights = min(footprint.weights, max(budget.limit, self._least))
        self._bindings: WeakSet[HeldBinding] = WeakSet()
        self._loaded = self._closed = False
        self._check(0)

    @property
    def held(self) -> int:
        """Bytes that it holds at present."""
        running = (binding.need for binding in self._bindings if binding.bound)
        return self._weights * self._loaded + sum(running)

    def bind(self, tensors: Mapping[str, Tensor]) -> HeldBinding:
        """See Session.bind. Nothing is loaded yet; BackendError if these shapes do not fit into the limit."""
        if self._closed:
            raise BackendError("the session is closed")
        check_tensors(self.inputs, self.outputs, tensors)
        need = activations(tensors, self.precision)
        self._check(need + sum(binding.need for binding in self._bindings))
        binding = HeldBinding(self, tensors, need)
        self._bindings.add(binding)
        return binding

    def load(self, tensors: Mapping[str, Tensor], need: int) -> Binding:
        """A binding of the backend's own, once there is room for it."""
        more = need + self._weights * (not self._loaded)
        try:
            binding = self._budget.admit(self, more, lambda: self._session.bind(tensors))
        except BaseException:
            if not self._loaded:
                self._session.unload()  # half of it may be there
            raise
        self._loaded = True
        return binding

    def counted(self) -> None:
        """A binding has been loaded."""
        self._budget.count(self)

    def used(self) -> None:
        """A binding runs."""
        self._budget.touch(self)

    def unload(self) -> None:
        """See Session.unload; bindings let go too."""
        try:
            if self._loaded:
                self.memory.synchronize()  # a device may still be at work with the weights
        finally:
            for binding in self._bindings:
                binding.drop()
            self._session.unload()
            self._loaded = False
            self._budget.drop(self)
            trim()

    def close(self) -> None:
        """See Session.close."""
        self.unload()
        self._closed = True
        self._session.close()

    def _check(self, need: int) -> None:
        limit = self._budget.limit
        if self._least + need <= limit:
            return
        of_it = f", {show_bytes(need)} of it for pictures of this size" if need else ""
        smaller = "ask for fewer or smaller pictures, " if need else ""
        raise BackendError(
            f"the {self.role} needs about {show_bytes(self._least + need)}{of_it}, more than the memory "
            f"limit of {show_bytes(limit)}: raise it, {smaller}take another backend, or export the "
            "checkpoint with smaller weights (--precision bf16)"
        )


class HeldBinding:
    """A binding within a budget: see Binding."""

    def __init__(self, session: HeldSession, tensors: Mapping[str, Tensor], need: int) -> None:
        self._session, self._tensors, self.need = session, tensors, need
        self._binding: Binding | None = None

    @property
    def bound(self) -> bool:
        """Whether it holds the backend's binding."""
        return self._binding is not None

    def run(self) -> None:
        """See Binding.run. Loads the session if it is not."""
        if self._binding is None:
            self._binding = self._session.load(self._tensors, self.need)
            self._session.counted()
        else:
            self._session.used()
        self._binding.run()

    def drop(self) -> None:
        """Let go of the backend's binding; the tensors stay."""
        self._binding = None
