"""Scenes: what is drawn at random keeps its word, and training never sees what is held out."""

import math
from dataclasses import replace

import numpy as np
import pytest

from allaprima.models.shapes.evaluate import held_out
from allaprima.models.shapes.scenes import (
    CANVASES,
    COLOURS,
    HELD_OUT_SHARE,
    KINDS,
    OPPOSITE,
    PALETTE,
    PLACES,
    RELATIONS,
    SIZES,
    Scene,
    Thing,
    draw_scene,
    draw_split,
    holds,
    render,
)

Key = tuple[tuple[tuple[str, str], ...], str]


def key(scene: Scene) -> Key:
    """What decides to which part a scene belongs."""
    return tuple(sorted((thing.colour, thing.kind) for thing in scene.things)), scene.background


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    random = np.random.default_rng(0)
    return [draw_scene(random, *CANVASES[k % 3]) for k in range(1500)]


def test_the_same_seed_gives_the_same_scenes(scenes: list[Scene]) -> None:
    random = np.random.default_rng(0)
    assert [draw_scene(random, *CANVASES[k % 3]) for k in range(20)] == scenes[:20]


def test_things_lie_inside_and_apart(scenes: list[Scene]) -> None:
    for scene in scenes:
        for thing in scene.things:
            assert thing.radius + 3 <= thing.x <= scene.width - thing.radius - 3
            assert thing.radius + 3 <= thing.y <= scene.height - thing.radius - 3
            assert thing.colour != scene.background
        if len(scene.things) == 2:
            a, b = scene.things
            assert math.dist((a.x, a.y), (b.x, b.y)) >= a.radius + b.radius + 4


def test_relations_are_plain_to_see(scenes: list[Scene]) -> None:
    for scene in scenes:
        if scene.relation is not None:
            first, second = scene.things
            assert [name for name in RELATIONS if holds(name, first, second)] == [scene.relation]
            assert holds(scene.relation, first, second, 1.5)
            assert holds(OPPOSITE[scene.relation], second, first, 1.5)


def test_places(scenes: list[Scene]) -> None:
    for scene in scenes:
        if scene.place is not None:
            (thing,) = scene.things
            x, y = thing.x / scene.width, thing.y / scene.height
            row = "top" if y < 0.449 else "bottom" if y > 0.551 else ""
            column = "left" if x < 0.449 else "right" if x > 0.551 else ""
            assert (" ".join(word for word in (row, column) if word) or "center") == scene.place


def test_everything_occurs(scenes: list[Scene]) -> None:
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.kind for thing in things} == set(KINDS)
    assert {thing.colour for thing in things} == {scene.background for scene in scenes} == set(COLOURS)
    assert {thing.size for thing in things} == set(SIZES)
    assert {scene.relation for scene in scenes} == {None, *RELATIONS}
    assert {scene.place for scene in scenes} == {None, *PLACES}
    assert len(COLOURS) >= 9
    assert len(KINDS) >= 6


def test_colours_can_be_told_apart() -> None:
    colours = [np.array(value, float) for value in PALETTE.values()]
    distances = [np.linalg.norm(a - b) for k, a in enumerate(colours) for b in colours[:k]]
    assert min(distances) > 83


def test_the_parts_are_disjoint() -> None:
    random = np.random.default_rng(1)
    seen = {key(draw_split(random, held_out=False, width=192)) for _ in range(1500)}
    unseen = {key(scene) for scene in held_out(300)[0]}
    assert len(unseen) > 150
    assert seen.isdisjoint(unseen)


def test_a_sixteenth_is_held_out(scenes: list[Scene]) -> None:
    share = sum(scene.held_out for scene in scenes) / len(scenes)
    assert 0.5 / HELD_OUT_SHARE < share < 1.6 / HELD_OUT_SHARE


def test_neither_order_nor_place_decides(scenes: list[Scene]) -> None:
    """Or else a held-out picture could be seen in training from the other side."""
    for scene in scenes[:200]:
        moved = tuple(replace(thing, x=9.0, y=9.0, size="small", radius=5.0) for thing in scene.things[::-1])
        other = replace(scene, things=moved, relation=None, place=None, width=999)
        assert other.held_out == scene.held_out


def test_the_examination_is_always_the_same() -> None:
    scenes, texts = held_out(20)
    assert (scenes, texts) == held_out(20)
    assert all(scene.held_out for scene in scenes)
    assert len(set(texts)) == 20


@pytest.mark.parametrize(("width", "height"), CANVASES)
def test_render(width: int, height: int) -> None:
    thing = Thing("square", "red", "large", width / 2, height / 2, 40.0)
    picture = render(Scene(width, height, "cyan", (thing,)))
    assert (picture.shape, picture.dtype) == ((height, width, 3), np.uint8)
    assert tuple(picture[0, 0]) == PALETTE["cyan"]
    assert tuple(picture[height // 2, width // 2]) == PALETTE["red"]
    area = (picture == PALETTE["red"]).all(-1).sum()
    assert area == pytest.approx(64**2, rel=0.05)


def test_a_ring_is_seen_through() -> None:
    ring = Thing("ring", "red", "large", 64.0, 64.0, 40.0)
    picture = render(Scene(128, 128, "yellow", (ring,)))
    assert tuple(picture[64, 64]) == PALETTE["yellow"]
    assert tuple(picture[64, 64 + 31]) == PALETTE["red"]
