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

    It is set forward when the group is entered after a pause: what was not used is not saved up.
    """

    model: str
    shape: Shape
    lanes: Lanes
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
        return tuple(group for group in self._groups.values() if group.lanes.paintings)

    def lanes_taken(self, size: Size) -> int:
        """How many pictures of a model and size are being painted."""
        return sum(len(group.lanes.paintings) for group in self._groups.values() if group.size == size)

    def enter(self, model: str, painting: Painting, make: Callable[[], Lanes]) -> Group:
        """Let a picture take part in its group, for which `make` makes lanes if there is none yet."""
        key = model, painting.shape
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(*key, make())
        if not group.lanes.paintings:
            floor = min((other.spent for other in self.busy), default=0.0)
            group.spent = max(group.spent, floor)
        group.lanes.admit(painting)
        return group

    def leave(self, group: Group, painting: Painting) -> None:
        """Let a picture go. Groups that are empty for longest lose their buffers if there are too many."""
        group.lanes.release(painting)
        if group.lanes.paintings:
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
