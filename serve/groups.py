"""Groups of pictures that take their steps together, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from allaprima.runtime.lanes import Lanes
from allaprima.runtime.painting import Painting, Shape

Size = tuple[str, int, int]
"""A model's name, height and width in pixels: what the number of lanes is measured for."""
IDLE_KEPT = 4
"""Groups that nobody is in, which keep their buffers for those who come next."""


@dataclass(eq=False)
class Group:
    """Pictures of one model and shape. `spent` is the time that it had of the device, in seconds.

    It is set forward when the group is entered after a pause: what was not used is not saved up. `kept` says
    whether it keeps its buffers when nobody is in it.
    """

    model: str
    shape: Shape
    lanes: Lanes
    kept: bool = True
    spent: float = 0.0
    left: float = 0.0

    @property
    def size(self) -> Size:
        """See Size."""
        return self.model, self.shape.height, self.shape.width


class Groups:
    """Shares the device between groups: the next step is that of the group that had least time of it."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, Shape], Group] = {}

    @property
    def busy(self) -> tuple[Group, ...]:
        """Those that somebody is in."""
        groups = list(self._groups.values())  # in one go, since others ask too
        return tuple(group for group in groups if group.lanes.paintings)

    def lanes_taken(self, size: Size) -> int:
        """How many pictures of a model and size are being painted."""
        return sum(len(group.lanes.paintings) for group in list(self._groups.values()) if group.size == size)

    def enter(self, model: str, painting: Painting, make: Callable[[], Lanes], kept: bool = True) -> Group:
        """Let a picture take part in its group, for which `make` makes lanes if there is none yet."""
        key = model, painting.shape
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(*key, make(), kept)
        if not group.lanes.paintings:
            most = max(other.spent for other in self._groups.values())
            floor = min((other.spent for other in self.busy), default=most)
            group.spent = max(group.spent, floor)
        group.lanes.admit(painting)
        return group

    def leave(self, group: Group, painting: Painting) -> None:
        """Let a picture go. Groups that are empty for longest lose their buffers if there are too many."""
        group.lanes.release(painting)
        if group.lanes.paintings:
            return
        if not group.kept:
            self._drop(group)
            return
        group.left = perf_counter()
        idle = sorted(
            (each for each in self._groups.values() if not each.lanes.paintings), key=lambda each: each.left
        )
        for each in idle[: max(0, len(idle) - IDLE_KEPT)]:
            self._drop(each)

    def next(self) -> Group | None:
        """The group whose turn it is; None if nobody is in any."""
        return min(self.busy, key=lambda group: group.spent, default=None)

    def drop(self, model: str) -> None:
        """Let go of the buffers of a model that is unloaded; nobody may be in its groups."""
        for group in [each for each in self._groups.values() if each.model == model]:
            self._drop(group)

    def _drop(self, group: Group) -> None:
        group.lanes.drop()
        del self._groups[group.model, group.shape]
