"""One picture on its way, apart from the batch in which it takes its steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from allaprima.bundle import Manifest, RequestError
from allaprima.runtime.inpainting import Kept
from allaprima.runtime.noise import Draws
from allaprima.runtime.preview import Previewer
from allaprima.runtime.samplers import Table, make_table, take_part
from allaprima.runtime.settings import Settings
from allaprima.runtime.stages import Denoiser


@dataclass(frozen=True)
class Shape:
    """What pictures must agree in to take their steps together: `height` and `width` in pixels.

    G `branches` of guidance, and L = `length` tokens of a prompt.
    """

    height: int
    width: int
    branches: int
    length: int


@dataclass(eq=False)
class Painting:
    """A picture that was begun: `row` calls of the denoiser are done, of as many as its `table` has rows.

    `state` holds its lane before the first and after the last of them, and while it is in no batch.
    """

    settings: Settings
    table: Table
    shape: Shape
    state: Denoiser
    draws: Draws
    kept: Kept | None
    previewer: Previewer | None
    warnings: tuple[str, ...]
    encoding: float
    """Seconds of its preparation."""
    denoising: float = 0.0
    """Its share of the seconds of the steps that it took."""
    row: int = 0

    @property
    def rows(self) -> int:
        """The number of calls of the denoiser."""
        return len(self.table.timesteps)

    @property
    def done(self) -> bool:
        """Whether only decoding is left."""
        return self.row >= self.rows


def each_alone(settings: Settings) -> tuple[Settings, ...]:
    """Settings for each picture of a request by itself; the picture is the same one.

    Raises RequestError for what cannot be painted together with others.
    """
    if settings.cache_interval > 1:
        raise RequestError(
            f"cache_interval is {settings.cache_interval}, but pictures that take their steps together "
            "compute each in full: leave it out"
        )
    varied = settings.variation_seed is not None

    def one(index: int) -> Settings:
        latents = None if settings.latents is None else settings.latents[index : index + 1]
        if varied:
            assert settings.variation_seed is not None
            return replace(
                settings, num_images=1, latents=latents, variation_seed=settings.variation_seed + index
            )
        return replace(settings, num_images=1, latents=latents, seed=settings.seed + index)

    return tuple(one(index) for index in range(settings.num_images))


def plan_table(manifest: Manifest, settings: Settings) -> Table:
    """The rows that a request takes of its sampler's table. Raises RequestError.

    The latest tables are kept: a server plans each request when it comes, and once more for each picture.
    """
    start, end = settings.denoising_start, settings.denoising_end
    scheduler, sampler = manifest.scheduler, settings.sampler
    steps, begin = settings.num_inference_steps, settings.begin
    asked = {"history": manifest.history, "eta": settings.eta, **settings.sampling.arguments()}

    def make(more: int = 0) -> Table:
        return make_table(scheduler, sampler, steps, begin=begin + more, **asked)

    named = repr((scheduler, sampler, steps, begin, asked, start, end))
    if start is None and end is None:
        return _planned(_Plan(named, make))
    trained = int(scheduler.get("num_train_timesteps", 1000))
    return _planned(_Plan(named, lambda: take_part(make, trained, start, end)))


@dataclass(frozen=True)
class _Plan:
    """How to make a table. Two of one name make the same."""

    name: str
    make: Callable[[], Table] = field(compare=False)


@functools.lru_cache(maxsize=64)
def _planned(plan: _Plan) -> Table:
    return plan.make()
