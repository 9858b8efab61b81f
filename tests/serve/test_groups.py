"""Whose turn it is, how many lanes there are, and which models are loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from allaprima.bundle import BackendError, BundleError, builtin_bundle
from allaprima.runtime import Pipeline
from allaprima.runtime.lanes import Lanes
from allaprima.runtime.loop import run_out
from allaprima.runtime.painting import Painting, Shape
from allaprima.serve.calibration import Measuring, count_lanes, measure_lanes, scaled
from allaprima.serve.errors import UnknownModelError
from allaprima.serve.groups import IDLE_KEPT, Group, Groups
from allaprima.serve.shelf import Shelf, Shelved

from .conftest import until


@dataclass(eq=False)
class Picture:
    """As much of a Painting as groups look at."""

    shape: Shape


@dataclass
class Places:
    """As much of Lanes."""

    paintings: list[Any] = field(default_factory=list)
    dropped: bool = False

    def admit(self, painting: Any) -> None:
        self.paintings.append(painting)

    def release(self, painting: Any) -> None:
        self.paintings.remove(painting)

    def drop(self) -> None:
        self.dropped = True


def enter(groups: Groups, size: int, model: str = "one") -> tuple[Group, Painting]:
    painting = cast(Painting, Picture(Shape(size, size, 2, 77)))
    return groups.enter(model, painting, lambda: cast(Lanes, Places())), painting


def share(groups: Groups, seconds: dict[Group, float], turns: int) -> dict[Group, float]:
    """The time that groups get of the device if their steps take so long."""
    had = dict.fromkeys(seconds, 0.0)
    for _ in range(turns):
        group = groups.next()
        assert group is not None
        group.spent += seconds[group]
        had[group] += seconds[group]
    return had


def test_groups_share_the_time() -> None:
    """Not the steps: a small picture is not held up by a large one."""
    groups = Groups()
    (small, _), (large, _) = enter(groups, 64), enter(groups, 512)
    had = share(groups, {small: 0.1, large: 1.0}, 550)
    assert had[small] == pytest.approx(had[large], rel=0.05)


def test_time_is_not_saved_up() -> None:
    groups = Groups()
    (one, _), (other, painting) = enter(groups, 64), enter(groups, 128)
    groups.leave(other, painting)
    share(groups, {one: 1.0}, 100)
    again, _ = enter(groups, 128)
    assert again is other
    had = share(groups, {one: 1.0, other: 1.0}, 10)
    assert had == {one: 5, other: 5}


def test_a_new_size_owes_nothing_and_is_owed_nothing() -> None:
    """One that was painted for long, alone, is not kept waiting when another one comes."""
    groups = Groups()
    old, painting = enter(groups, 64)
    share(groups, {old: 1.0}, 1000)
    groups.leave(old, painting)
    new, _ = enter(groups, 128)
    assert enter(groups, 64)[0] is old
    assert share(groups, {old: 1.0, new: 1.0}, 10) == {old: 5, new: 5}


def test_groups_that_keep_nothing() -> None:
    groups = Groups()
    painting = cast(Painting, Picture(Shape(64, 64, 2, 77)))
    group = groups.enter("one", painting, lambda: cast(Lanes, Places()), kept=False)
    groups.leave(group, painting)
    assert cast(Places, group.lanes).dropped
    assert groups.next() is None


def test_who_is_where() -> None:
    groups = Groups()
    assert groups.next() is None
    (one, first), (two, _) = enter(groups, 64), enter(groups, 64)
    assert one is two
    assert enter(groups, 64, "other")[0] is not one
    assert (groups.lanes_taken(one.size), groups.lanes_taken(("one", 32, 32))) == (2, 0)
    groups.leave(one, first)
    assert len(groups.busy) == 2


def test_buffers_of_idle_groups() -> None:
    """A few are kept; those that were left longest ago go first, and all of a model that is unloaded."""
    groups = Groups()
    made = [enter(groups, 32 * size) for size in range(1, IDLE_KEPT + 3)]
    for group, painting in made:
        groups.leave(group, painting)
    assert [cast(Places, group.lanes).dropped for group, _ in made] == [True, True] + [False] * IDLE_KEPT
    groups.drop("other")
    groups.drop("one")
    assert all(cast(Places, group.lanes).dropped for group, _ in made)


@pytest.mark.parametrize(
    ("seconds", "lanes"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}, 16),
        ({1: 1.0, 2: 2.0}, 1),
        ({1: 1.0, 2: 1.5, 4: 2.0, 8: 4.0}, 4),
        ({1: 1.0, 2: 1.5}, 2),
    ],
)
def test_as_many_lanes_as_gain(seconds: dict[int, float], lanes: int) -> None:
    def rate(count: int) -> Measuring[float]:
        if count not in seconds:
            raise BackendError("no memory")
        yield
        return count / seconds[count]

    assert run_out(count_lanes(rate, 16)) == lanes
    assert run_out(count_lanes(rate, 1)) == 1


def test_not_even_one_lane() -> None:
    def rate(count: int) -> Measuring[float]:
        yield
        raise BackendError("no memory")

    with pytest.raises(BackendError, match="no memory"):
        run_out(count_lanes(rate, 4))


def test_lanes_of_other_sizes() -> None:
    measured = {(512, 512): 4, (1024, 1024): 1}
    assert [scaled(measured, *size) for size in ((512, 512), (256, 256), (512, 768), (2048, 2048))] == [
        4,
        16,
        2,
        1,
    ]
    assert scaled({}, 512, 512) == 1


def test_lanes_are_measured() -> None:
    with Pipeline.open("shapes", backend="ort", threads=1) as pipeline:
        parts: list[None] = []
        assert run_out(measure_lanes(pipeline, 32, 32, 2), parts.append) in (1, 2)
        assert len(parts) == 6
        pipeline.generate("a", height=32, width=32, num_inference_steps=1)


class Opened:
    """A pipeline that knows only whether it is open."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def make_shelf(folders: list[Path], models: float) -> tuple[Shelf, list[int | None]]:
    """A shelf with memory for so many of its models, and the limits that they were opened with."""
    limits: list[int | None] = []

    def opens(folder: Path, limit: int | None) -> Pipeline:
        limits.append(limit)
        return cast(Pipeline, Opened())

    size = Shelf(folders[:1], opens, None).models[0].size
    return Shelf(folders, opens, int(size * models)), limits


def always(_: Shelved) -> bool:
    return True


def load(shelf: Shelf, model: Shelved, idle: Callable[[Shelved], bool] = always) -> Pipeline | None:
    """Ask for a model, wait, and fetch it."""
    if (pipeline := shelf.fetch(model, idle)) is None:
        shelf.wait(model)
        pipeline = shelf.fetch(model, idle)
    return pipeline


def test_least_recently_used_models_go(copies: Callable[[str], Path]) -> None:
    shelf, limits = make_shelf([copies(name) for name in ("one", "two", "three")], 2.5)
    one, two, three = shelf.models
    told: list[str] = []
    shelf.before_unload = told.append
    first, second = load(shelf, one), load(shelf, two)
    assert load(shelf, one) is first
    load(shelf, three)
    assert told == ["two"]
    assert cast(Opened, second).closed
    assert (one.pipeline, two.pipeline) == (first, None)
    assert limits == [None] * 3
    shelf.close()
    assert cast(Opened, first).closed
    assert told == ["two", "one", "three"]


def test_models_in_use_stay(copies: Callable[[str], Path]) -> None:
    shelf, _ = make_shelf([copies(name) for name in ("one", "two")], 1.5)
    one, two = shelf.models
    load(shelf, one)
    assert load(shelf, two, lambda other: False) is None
    assert one.pipeline is not None
    assert load(shelf, two) is not None
    assert one.pipeline is None


def test_a_model_larger_than_the_limit_is_opened_within_it(copies: Callable[[str], Path]) -> None:
    shelf, limits = make_shelf([copies("one")], 0.5)
    assert load(shelf, shelf.models[0]) is not None
    assert limits == [shelf.models[0].size // 2]


def test_a_model_that_nobody_waits_for_any_more_makes_room(copies: Callable[[str], Path]) -> None:
    shelf, _ = make_shelf([copies(name) for name in ("one", "two")], 1.5)
    one, two = shelf.models
    assert shelf.fetch(one, always) is None
    shelf.wait(one)
    assert load(shelf, two) is not None
    assert (one.pipeline, one.loading) == (None, None)


def test_a_model_that_is_loaded_too_late() -> None:
    """When the shelf is closed it is let go of as soon as it is there."""
    go, opened = threading.Event(), Opened()

    def opens(folder: Path, limit: int | None) -> Pipeline:
        assert go.wait(10)
        return cast(Pipeline, opened)

    shelf = Shelf(["shapes"], opens, None)
    assert shelf.fetch(shelf.models[0], always) is None
    assert shelf.fetch(shelf.models[0], always) is None
    shelf.close()
    assert not opened.closed
    go.set()
    until(lambda: opened.closed)


def test_a_model_that_fails_is_tried_again() -> None:
    found: list[Exception | Opened] = [BackendError("no such device"), Opened()]

    def opens(folder: Path, limit: int | None) -> Pipeline:
        each = found.pop(0)
        if isinstance(each, Exception):
            raise each
        return cast(Pipeline, each)

    shelf = Shelf(["shapes"], opens, None)
    with pytest.raises(BackendError, match="no such device"):
        load(shelf, shelf.models[0])
    assert load(shelf, shelf.models[0]) is not None


def test_names(copies: Callable[[str], Path]) -> None:
    shelf, _ = make_shelf([copies("one"), builtin_bundle("shapes")], 2)
    assert (shelf.find(None).name, shelf.find("shapes").name) == ("one", "shapes")
    with pytest.raises(UnknownModelError, match="there is no model 'two' here: choose from one, shapes"):
        shelf.find("two")
    with pytest.raises(BundleError, match=r"are both named 'shapes': export one of them with another --name"):
        make_shelf([builtin_bundle("shapes"), builtin_bundle("shapes")], 2)
    with pytest.raises(BundleError, match="there is no model to serve"):
        Shelf([], lambda folder, limit: cast(Pipeline, Opened()), None)
