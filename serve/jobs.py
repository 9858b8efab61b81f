"""Jobs: what was asked of a server, how far it is, and whoever listens."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from PIL.Image import Image

from allaprima.runtime import Request, Result, Settings
from allaprima.runtime.prior_request import PriorRequest
from allaprima.serve.errors import CancelledError

MOST_EVENTS = 64
"""That wait for a listener."""
State = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Order:
    """What a client asks for.

    `model` None is the server's first. Previews come after every `preview_every` calls of the model; None is
    never. `deadline` in seconds from now: a job that is not done by then is stopped; None is the server's.
    `owner` is whose it is, a name without meaning: nobody else is told of it. None is everybody's.
    """

    request: Request
    model: str | None = None
    preview_every: int | None = None
    deadline: float | None = None
    owner: str | None = None

    def without_pictures(self) -> Order:
        """The same, without what takes memory."""
        request = replace(self.request, image=None, mask=None, hint=None, prior_image=None, mix=None)
        return replace(self, request=request)


@dataclass(frozen=True)
class Status:
    """A job at one moment.

    `position` is its place in the queue, from 1, while it is queued, else None. `step` of `steps` calls of
    the model are done, of all its pictures together (`steps` is 0 until that is known). Times are in seconds
    since the epoch; `error` is a sentence for the user.
    """

    id: str
    model: str
    state: State
    images: int
    position: int | None = None
    step: int = 0
    steps: int = 0
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    error: str | None = None

    @property
    def progress(self) -> float:
        """The share that is done, from 0 to 1."""
        if self.state == "done":
            return 1.0
        return self.step / self.steps if self.steps else 0.0


Kind = Literal["status", "preview", "ended"]


@dataclass(frozen=True)
class Event:
    """Something happened: the job moved on, there is a preview of picture `index`, or it ended."""

    kind: Kind
    status: Status
    image: Image | None = None
    index: int = 0


Listener = Callable[[Event], None]


@dataclass(eq=False)
class Job:
    """One order on its way, with everything in `settings` resolved. Any method may be called from any thread.

    `result` is there when the state is "done", `failure` when it is "failed" or "cancelled".
    """

    order: Order
    model: str
    settings: Settings
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    result: Result | None = None
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []
        self._waiting: list[Listener] = []  # for the end alone
        self._cancelled = threading.Event()
        self._wake: Callable[[], None] = lambda: None
        self._status = Status(self.id, self.model, "queued", self.settings.num_images, created=time.time())

    @property
    def status(self) -> Status:
        """How far it is."""
        return self._status

    @property
    def input_bytes(self) -> int:
        """What the pictures that it begins with take, unpacked."""
        given = self.settings
        pictures = [given.picture, given.mask, given.hint, given.prior.picture]
        pictures += [item for item, _ in given.prior.mix if not isinstance(item, str)]
        sizes = (each.width * each.height * len(each.getbands()) for each in pictures if each is not None)
        return sum(sizes)

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to stop it."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ask to stop it: it ends before the next step. Nothing happens if it has ended."""
        self._cancelled.set()
        self._wake()

    async def events(self) -> AsyncIterator[Event]:
        """What happens from now on, the present status first; ends after the event "ended".

        Whoever stops listening has no effect on the job; who listens slowly misses what lies far back.
        """
        loop, come = asyncio.get_running_loop(), asyncio.Event()
        waiting: deque[Event] = deque(maxlen=MOST_EVENTS)

        def put(event: Event) -> None:
            waiting.append(event)  # the oldest makes room, and "ended" comes last
            with suppress(RuntimeError):  # the loop of a listener that is gone is closed
                loop.call_soon_threadsafe(come.set)

        first = self._listen(put, self._listeners)
        try:
            yield first
            while first.kind != "ended":
                await come.wait()
                come.clear()
                while waiting:
                    first = waiting.popleft()
                    yield first
                    if first.kind == "ended":  # whatever another thread was still about to tell
                        return
        finally:
            self._forget(put, self._listeners)

    async def wait(self) -> Result:
        """The result. Raises what the job failed with: an AllaprimaError, CancelledError among them."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def tell(_: Event) -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(ended.set)

        try:
            if self._listen(tell, self._waiting).kind != "ended":
                await ended.wait()
        finally:
            self._forget(tell, self._waiting)
        if self.failure is not None:
            raise self.failure
        assert self.result is not None
        return self.result

    # For the studio, which paints.

    def on_cancel(self, wake: Callable[[], None]) -> None:
        """Call `wake` when somebody cancels it."""
        self._wake = wake

    def update(self, **changes: object) -> None:
        """Change fields of the status, and tell."""
        with self._lock:
            if self._status.state in ENDED:
                return
            self._status = replace(self._status, **changes)  # type: ignore[arg-type]
            event, listeners = Event("status", self._status), tuple(self._listeners)
        for listener in listeners:
            listener(event)

    def show(self, image: Image, index: int) -> None:
        """Tell of a preview of a picture."""
        with self._lock:
            event, listeners = Event("preview", self._status, image, index), tuple(self._listeners)
        for listener in listeners:
            listener(event)

    def finish(self, outcome: Result | Exception) -> bool:
        """End it with its pictures or with what went wrong, and tell; False if it had ended before."""
        with self._lock:
            if self._status.state in ENDED:
                return False
            state: State = "done"
            error = None
            if isinstance(outcome, Exception):
                self.failure, error = outcome, str(outcome)
                state = "cancelled" if isinstance(outcome, CancelledError) else "failed"
            else:
                self.result = outcome
            self._status = replace(self._status, state=state, error=error, position=None, ended=time.time())
            event, listeners = Event("ended", self._status), (*self._listeners, *self._waiting)
            self._listeners.clear()
            self._waiting.clear()
        # It may be kept for a while; nobody needs what it began with.
        self.settings = replace(
            self.settings, picture=None, latents=None, mask=None, hint=None, prior=PriorRequest()
        )
        for listener in listeners:
            listener(event)
        return True

    def _listen(self, listener: Listener, among: list[Listener]) -> Event:
        """Add a listener unless the job has ended; what it is to be told first."""
        with self._lock:
            if self._status.state in ENDED:
                return Event("ended", self._status)
            among.append(listener)
            return Event("status", self._status)

    def _forget(self, listener: Listener, among: list[Listener]) -> None:
        with self._lock:
            if listener in among:
                among.remove(listener)
