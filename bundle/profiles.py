"""Optimization profiles: the shapes that a compiled engine serves, as extents of its symbolic axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from allaprima.bundle.manifest import TensorSpec
from allaprima.bundle.record import Record

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile(Record):
    """For each axis ("B", "G", "H", "W") the smallest, the best served and the largest extent."""

    extents: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        for axis, extents in self.extents.items():
            if len(extents) != 3 or not 1 <= extents[0] <= extents[1] <= extents[2]:
                raise ValueError(
                    f"axis {axis} goes from {extents} in a profile: smallest, best and largest, in that order"
                )

    def shapes(self, spec: TensorSpec) -> tuple[Shape, Shape, Shape]:
        """The smallest, best and largest shape of a tensor."""
        smallest, best, largest = (
            spec.resolve({axis: extents[k] for axis, extents in self.extents.items()}) for k in range(3)
        )
        return smallest, best, largest

    def serves(self, extents: Mapping[str, int]) -> bool:
        """Whether all these extents lie within."""
        return all(low <= extents[axis] <= high for axis, (low, _, high) in self.extents.items())

    def words(self) -> str:
        """As in "B 2 to 4 (best 4), H 64, W 96"."""
        return ", ".join(
            f"{axis} {low}" if low == high else f"{axis} {low} to {high} (best {best})"
            for axis, (low, best, high) in self.extents.items()
        )


def nearest(profiles: Iterable[Profile], extents: Mapping[str, int]) -> Profile | None:
    """The profile that these extents miss by the smallest factors; one that serves them if there is one."""

    def distance(profile: Profile) -> float:
        return sum(
            max(0.0, math.log(low / extents[axis]), math.log(extents[axis] / high))
            for axis, (low, _, high) in profile.extents.items()
        )

    return min(profiles, key=distance, default=None)
