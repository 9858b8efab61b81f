"""A part of a table: what a base model paints of a picture, and what its refiner does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from allaprima.bundle.errors import RequestError
from allaprima.runtime.samplers.catalog import find
from allaprima.runtime.samplers.table import Table


def take_part(make: Callable[[int], Table], timesteps: int, start: float | None, end: float | None) -> Table:
    """The whole steps between two shares of the noise schedule.

    `make` makes the table without its first steps, `timesteps` are those of training. A step belongs to the
    part before a share d if it begins at a timestep of at least `timesteps * (1 - d)`, rounded, as diffusers'
    denoising_end and denoising_start have it.

    Raises:
        RequestError: no step is left, or the sampler cannot begin there.
    """
    whole = make(0)
    skipped = 0 if start is None else _steps_before(whole, timesteps, start)
    steps = -(-len(whole.timesteps) // find(whole.sampler).calls)
    if skipped >= steps:
        raise RequestError(
            f"denoising_start {start} leaves none of {steps} steps: take more steps, or start earlier"
        )
    table = make(skipped) if skipped else whole
    if end is None:
        return table
    kept = _steps_before(table, timesteps, end)
    if not kept:
        raise RequestError(f"denoising_end {end} leaves no step: take more steps, or end later")
    return _ended(table, kept * find(table.sampler).calls)


def _steps_before(table: Table, timesteps: int, share: float) -> int:
    begins = table.timesteps[:: find(table.sampler).calls]
    return int(np.count_nonzero(begins >= round(timesteps - share * timesteps)))


def _ended(table: Table, rows: int) -> Table:
    """The first rows; `levels` has one more, that of the result."""
    arrays = {name: value for name, value in vars(table).items() if isinstance(value, np.ndarray)}
    ended: dict[str, Any] = {name: value[: rows + (name == "levels")] for name, value in arrays.items()}
    return replace(table, **ended)
