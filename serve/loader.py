"""The loader: brings models to where they can paint, while others are painted with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence

from allaprima.bundle import RequestError
from allaprima.runtime import Pipeline
from allaprima.serve.calibration import measure_lanes, scaled
from allaprima.serve.shelf import Shelf, Shelved

_LOG = logging.getLogger("allaprima.serve")
MOST_LANES = 16
"""More were never worth it where it was measured."""
Size = tuple[int, int]
"""Height and width in pixels."""


class Loader:
    """Loads models beside the steps of others, and measures their lanes between them. For one thread."""

    def __init__(self, shelf: Shelf, *, lanes: int | None, warm: Sequence[Size] | None) -> None:
        """`lanes` and `warm` as of Studio."""
        self._shelf, self._fixed, self._warm = shelf, lanes, warm
        self._measured: dict[str, dict[Size, int]] = {}
        self._measuring: dict[Shelved, Generator[None, None, None]] = {}
        self._began = False  # whether the default model was ready once

    def ask(self, model: Shelved, idle: Callable[[Shelved], bool]) -> Pipeline | None:
        """A model's pipeline once it can paint; until then None, and it is on its way if there is room.

        Raises as `Shelf.fetch`.
        """
        pipeline = self._shelf.fetch(model, lambda other: other not in self._measuring and idle(other))
        if pipeline is None or model.name in self._measured:
            return pipeline
        if model not in self._measuring:
            self._measuring[model] = self._measure(model, pipeline)
        return None

    def coming(self, model: Shelved) -> bool:
        """Whether it is on its way, for which nobody else has to make room any more."""
        return model.loading is not None or model in self._measuring

    def turn(self) -> bool:
        """Take one step of measuring; whether there was any. Raises AllaprimaError for the default model."""
        for model, measuring in self._measuring.items():
            if next(measuring, self) is self:
                del self._measuring[model]
            return True
        return False

    def forget(self, model: str) -> None:
        """A model is unloaded: if it could not be measured, it is tried again."""
        if not self._measured.get(model):
            self._measured.pop(model, None)

    def keeps(self, model: str) -> bool:
        """Whether buffers of a model may be kept for those who come next: not if weights come and go."""
        pipeline = self._shelf.find(model).pipeline
        return pipeline is None or not pipeline.limited

    def lanes(self, model: str, height: int, width: int) -> int:
        """The most pictures of a size that are painted together.

        One where weights come and go to stay within a limit: there is no memory to spare.
        """
        if not self.keeps(model):
            return 1
        return self._fixed or scaled(self._measured.get(model, {}), height, width)

    def _measure(self, model: Shelved, pipeline: Pipeline) -> Generator[None, None, None]:
        """Find the lanes of a model, which can paint afterwards.

        A size that was not asked for, and that it cannot paint, says only that others are not measured: there
        may be engines for other sizes alone.
        """
        defaults = model.bundle.manifest.defaults
        of_default = model is self._shelf.find(None)
        asked = self._warm if of_default else None
        most = MOST_LANES if self._fixed is None and not pipeline.limited else 1
        found: dict[Size, int] = {}
        for size in asked or ((defaults.height, defaults.width),):
            try:
                found[size] = yield from measure_lanes(pipeline, *size, most)
            except Exception as error:
                fatal = asked or not isinstance(error, RequestError)
                if of_default and fatal and not self._began:
                    raise
                _LOG.warning(
                    "a model is not warm", extra={"facts": {"model": model.name, "reason": str(error)}}
                )
        self._measured[model.name] = found
        self._began = True
