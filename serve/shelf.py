"""The models that a server has: their manifests always, their weights when they are needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from allaprima.bundle import BackendError, Bundle, BundleError, open_bundle, resolve
from allaprima.runtime import Pipeline
from allaprima.runtime.components import weigh_files
from allaprima.serve.errors import UnknownModelError

Opens = Callable[[Path, int | None], Pipeline]
"""Opens a bundle's folder within a memory limit."""


@dataclass(eq=False)
class Shelved:
    """A model: its bundle, what its weights take in bytes, and its pipeline while it is loaded.

    `loading` is there from the moment at which it begins to be loaded until its pipeline is fetched.
    """

    name: str
    bundle: Bundle
    size: int
    pipeline: Pipeline | None = None
    loading: Future[Pipeline] | None = None
    used: float = 0.0


class Shelf:
    """Models by name, the default one first. Fetching and unloading are for one thread alone.

    Weights are loaded on threads of their own, while that one goes on.
    """

    def __init__(self, bundles: Sequence[str | Path], opens: Opens, memory_limit: int | None) -> None:
        """`memory_limit` in bytes is what all loaded models may take together; None is no limit.

        Raises BundleError if a bundle cannot be opened, or two have one name.
        """
        self._opens, self._limit = opens, memory_limit
        self.before_unload: Callable[[str], None] = lambda name: None
        """Told the name of a model that is about to be unloaded."""
        self.loaded: Callable[[], None] = lambda: None
        """Told, on another thread, that a model was loaded or failed to be."""
        self._models: dict[str, Shelved] = {}
        for each in bundles:
            bundle = open_bundle(resolve(str(each)))
            name = bundle.manifest.name
            if name in self._models:
                raise BundleError(
                    f"{bundle.folder} and {self._models[name].bundle.folder} are both named '{name}': "
                    "export one of them with another --name"
                )
            size = sum(weigh_files(bundle, role).weights for role in bundle.manifest.components)
            self._models[name] = Shelved(name, bundle, size)
        if not self._models:
            raise BundleError("there is no model to serve: name a bundle")

    @property
    def models(self) -> tuple[Shelved, ...]:
        """All of them, the default one first."""
        return tuple(self._models.values())

    def find(self, name: str | None) -> Shelved:
        """A model by name, None is the default. Raises UnknownModelError."""
        if name is None:
            return self.models[0]
        if name not in self._models:
            raise UnknownModelError(f"there is no model '{name}' here: choose from {', '.join(self._models)}")
        return self._models[name]

    def fetch(self, model: Shelved, idle: Callable[[Shelved], bool]) -> Pipeline | None:
        """The model's pipeline; None if it is being loaded, or can only be when another model is idle.

        Idle models that were not used for longest make room. Raises BundleError or BackendError, whatever it
        could not be loaded for; the next time it is tried again.
        """
        model.used = time.monotonic()
        if model.pipeline is None and model.loading is None and self._make_room(model, idle):
            alone = self._limit is not None and model.size > self._limit
            limit = self._limit if alone else None
            model.loading = _in_background(lambda: self._opens(model.bundle.folder, limit))
            model.loading.add_done_callback(lambda _: self.loaded())
        elif model.loading is not None and model.loading.done():
            loading, model.loading = model.loading, None
            model.pipeline = loading.result()
        return model.pipeline

    def wait(self, model: Shelved) -> None:
        """Until a model that is being loaded can be fetched."""
        if model.loading is not None:
            model.loading.exception()

    def unload(self, model: Shelved) -> None:
        """Let go of a model's weights."""
        if model.pipeline is not None:
            self.before_unload(model.name)
            model.pipeline.close()
            model.pipeline = None

    def close(self) -> None:
        """Let go of all of them; of one that is being loaded, as soon as it is there."""
        for model in self.models:
            self.unload(model)
            if model.loading is not None:
                model.loading.add_done_callback(_close)
                model.loading = None

    def _make_room(self, model: Shelved, idle: Callable[[Shelved], bool]) -> bool:
        """Unload what was not used for longest, if that is enough; whether it is."""
        if self._limit is None:
            return True
        for each in self.models:
            self._claim(each)
        others = sorted((each for each in self.models if each.pipeline or each.loading), key=_last_used)
        missing = sum(each.size for each in others) + model.size - self._limit
        victims = []
        for each in others:
            if missing > 0 and each.pipeline and idle(each):
                victims.append(each)
                missing -= each.size
        if missing > 0 and len(victims) < len(others):
            return False
        for each in victims:
            self.unload(each)
        return True

    def _claim(self, model: Shelved) -> None:
        """Take what was loaded though nobody asked for it again."""
        if model.loading is not None and model.loading.done():
            loading, model.loading = model.loading, None
            if loading.exception() is None:
                model.pipeline = loading.result()


def _last_used(model: Shelved) -> float:
    return model.used


def _in_background(work: Callable[[], Pipeline]) -> Future[Pipeline]:
    """Do it on a thread that does not keep the process from ending."""
    future: Future[Pipeline] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
        except BaseException as error:  # libraries in Rust panic with what is no Exception
            future.set_exception(BackendError(f"the model could not be loaded: {error!r}"))

    threading.Thread(target=run, name="allaprima-loader", daemon=True).start()
    return future


def _close(loading: Future[Pipeline]) -> None:
    if loading.exception() is None:
        loading.result().close()
