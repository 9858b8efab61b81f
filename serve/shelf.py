"""The models that a server has: their manifests always, their weights when they are needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from allaprima.bundle import Bundle, BundleError, open_bundle, resolve
from allaprima.runtime import Pipeline
from allaprima.runtime.components import weigh_files
from allaprima.serve.errors import UnknownModelError

Opens = Callable[[Path, int | None], Pipeline]
"""Opens a bundle's folder within a memory limit."""


@dataclass(eq=False)
class Shelved:
    """A model: its bundle, what its weights take in bytes, and its pipeline while it is loaded."""

    name: str
    bundle: Bundle
    size: int
    pipeline: Pipeline | None = None
    used: float = 0.0


class Shelf:
    """Models by name, the default one first. Loading and unloading are for one thread alone."""

    def __init__(self, bundles: Sequence[str | Path], opens: Opens, memory_limit: int | None) -> None:
        """`memory_limit` in bytes is what all loaded models may take together; None is no limit.

        Raises BundleError if a bundle cannot be opened, or two have one name.
        """
        self._opens, self._limit = opens, memory_limit
        self.before_unload: Callable[[str], None] = lambda name: None
        """Told the name of a model that is about to be unloaded."""
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

    def load(self, model: Shelved, idle: Callable[[Shelved], bool]) -> Pipeline | None:
        """The model's pipeline, loaded if it is not; None if there is no room before another one is idle.

        Idle models that were not used for longest make room. Raises BundleError or BackendError.
        """
        model.used = time.monotonic()
        if model.pipeline is not None:
            return model.pipeline
        if self._limit is not None:
            others = sorted((each for each in self.models if each.pipeline), key=lambda each: each.used)
            while others and sum(each.size for each in others) + model.size > self._limit:
                victim = next((each for each in others if idle(each)), None)
                if victim is None:
                    return None
                self.unload(victim)
                others.remove(victim)
        alone = self._limit is not None and model.size > self._limit
        model.pipeline = self._opens(model.bundle.folder, self._limit if alone else None)
        return model.pipeline

    def unload(self, model: Shelved) -> None:
        """Let go of a model's weights."""
        if model.pipeline is not None:
            self.before_unload(model.name)
            model.pipeline.close()
            model.pipeline = None

    def close(self) -> None:
        """Let go of all of them."""
        for model in self.models:
            self.unload(model)
