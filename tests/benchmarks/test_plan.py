"""What is asked of contestants."""

from dataclasses import replace

import pytest

from allaprima.benchmarks.plan import Plan, Work, grid, side_by_side
from allaprima.bundle import RequestError


def test_a_grid_keeps_shapes_together() -> None:
    works = grid((8, 1, 8), ((64, 32), (32, 32)), (2, 1))
    assert works == (
        Work(1, 32, 32, 1), Work(1, 32, 32, 8), Work(1, 64, 32, 1), Work(1, 64, 32, 8),
        Work(2, 32, 32, 1), Work(2, 32, 32, 8), Work(2, 64, 32, 1), Work(2, 64, 32, 8),
    )  # fmt: skip
    assert str(works[1]) == "8 steps, batch 1, 32x32"
    assert str(works[0]) == "1 step, batch 1, 32x32"


def test_every_shape_is_warmed_up_once(plan: Plan) -> None:
    assert [(warm, [work.steps for work in works]) for warm, works in plan.by_shape()] == [
        (Work(1, 16, 8, 2), [1, 5]),
        (Work(2, 16, 8, 2), [1, 5]),
    ]


@pytest.mark.parametrize(
    ("steps", "sizes", "batches", "name"),
    [((0,), ((8, 8),), (1,), "steps"), ((1,), ((8, 8),), (0,), "batch"), ((1,), ((8, 0),), (1,), "size")],
)
def test_nothing_below_one(
    steps: tuple[int, ...], sizes: tuple[tuple[int, int], ...], batches: tuple[int, ...], name: str
) -> None:
    with pytest.raises(RequestError, match=f"{name} is 0"):
        grid(steps, sizes, batches)


def test_a_plan_that_measures_nothing_is_refused(plan: Plan) -> None:
    for change in ({"rounds": 0}, {"repeats": 0}, {"works": ()}):
        with pytest.raises(RequestError, match=r"at least 1|no configuration"):
            replace(plan, **change)
    with pytest.raises(RequestError, match="threads is 0"):
        replace(plan, settings=replace(plan.settings, threads=0))


def test_what_stands_side_by_side() -> None:
    works = grid((1, 20, 50), ((64, 64), (128, 64)), (1, 4))
    assert side_by_side(works) == Work(1, 128, 64, 20)
    assert side_by_side(grid((1, 8), ((64, 64),), (4,))) == Work(4, 64, 64, 8)
