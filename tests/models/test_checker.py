"""The examiner examined: it passes right pictures, and no wrong ones."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from allaprima.models.shapes.checker import Picture, judge, look, score
from allaprima.models.shapes.scenes import CANVASES, COLOURS, KINDS, Scene, Thing, draw_scene, render

Change = Callable[[Scene, np.random.Generator], Scene]


def draw(count: int, seed: int, pair: bool | None = None, related: bool = False) -> list[Scene]:
    """Random scenes on the three canvases in turn."""
    random = np.random.default_rng(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = draw_scene(random, *CANVASES[len(scenes) % 3])
        if pair in (None, len(scene.things) == 2) and not (related and scene.relation is None):
            scenes.append(scene)
    return scenes


def test_rendered_scenes_pass() -> None:
    found = score(draw(1000, seed=0), lambda _, scene: render(scene))
    assert found.captions == 1000
    assert found.things >= 0.99
    assert found.relation >= 0.99
    assert len(found.failures) <= 10


def other(names: tuple[str, ...], *taken: str) -> str:
    """The name after the first of `taken`, which is none of them."""
    start = names.index(taken[0])
    turned = names[start + 1 :] + names[:start]
    return next(name for name in turned if name not in taken)


def colour(scene: Scene, random: np.random.Generator) -> Scene:
    first, *rest = scene.things
    changed = replace(first, colour=other(COLOURS, first.colour, scene.background))
    return replace(scene, things=(changed, *rest))


def kind(scene: Scene, random: np.random.Generator) -> Scene:
    first, *rest = scene.things
    return replace(scene, things=(replace(first, kind=other(KINDS, first.kind)), *rest))


def ground(scene: Scene, random: np.random.Generator) -> Scene:
    return replace(
        scene, background=other(COLOURS, scene.background, *(thing.colour for thing in scene.things))
    )


def missing(scene: Scene, random: np.random.Generator) -> Scene:
    return replace(scene, things=scene.things[1:])


def twice(scene: Scene, random: np.random.Generator) -> Scene:
    """A copy of the only thing, in the corner that is farthest from it."""
    (thing,) = scene.things
    x, y = (
        12.0 if at > side / 2 else side - 12.0
        for at, side in ((thing.x, scene.width), (thing.y, scene.height))
    )
    return replace(scene, things=(thing, replace(thing, x=x, y=y, radius=9.0)))


def exchanged(scene: Scene, random: np.random.Generator) -> Scene:
    """Each thing in the colour of the other."""
    a, b = scene.things
    return replace(scene, things=(replace(a, colour=b.colour), replace(b, colour=a.colour)))


def swapped(scene: Scene, random: np.random.Generator) -> Scene:
    """Each thing in the place of the other."""
    a, b = scene.things
    return replace(scene, things=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)))


def fooled(scenes: list[Scene], change: Change) -> list[Scene]:
    """The scenes whose changed picture passes in things."""
    random = np.random.default_rng(0)
    return [scene for scene in scenes if judge(scene, render(change(scene, random))).things]


@pytest.mark.parametrize(
    ("change", "pair"), [(colour, None), (kind, None), (ground, None), (missing, None), (twice, False)]
)
def test_wrong_things_are_told(change: Change, pair: bool | None) -> None:
    assert len(fooled(draw(200, seed=1, pair=pair), change)) <= 2


def test_exchanged_colours_are_told() -> None:
    scenes = [
        scene
        for scene in draw(250, seed=2, pair=True)
        if len({thing.colour for thing in scene.things}) == len({thing.kind for thing in scene.things}) == 2
    ]
    assert len(scenes) > 150
    assert fooled(scenes, exchanged) == []


def test_swapped_relations_are_told() -> None:
    """The things are right, so that is all that is wrong."""
    random = np.random.default_rng(0)
    scenes = [
        scene
        for scene in draw(200, seed=3, related=True)
        if scene.things[0].kind != scene.things[1].kind or scene.things[0].colour != scene.things[1].colour
    ]
    verdicts = [judge(scene, render(swapped(scene, random))) for scene in scenes]
    assert not any(verdict.relation for verdict in verdicts)
    assert sum(verdict.things for verdict in verdicts) >= 0.99 * len(verdicts)


def test_no_relation_is_asked_where_none_is_named() -> None:
    for scene in draw(50, seed=4):
        assert (judge(scene, render(scene)).relation is None) == (scene.relation is None)


def test_score_counts() -> None:
    """Every second picture is blank."""
    scenes = draw(40, seed=5, related=True)

    def paint(index: int, scene: Scene) -> Picture:
        return render(scene if index % 2 else replace(scene, things=()))

    found = score(scenes, paint)
    assert (found.captions, found.things, found.relation) == (40, 0.5, 0.5)
    assert found.failures == tuple(range(0, 40, 2))


def test_look() -> None:
    things = (
        Thing("star", "green", "large", 40.0, 64.0, 30.0),
        Thing("ring", "black", "small", 140.0, 30.0, 16.0),
    )
    background, seen = look(render(Scene(192, 128, "pink", things)))
    assert background == "pink"
    assert [(one.kind, one.colour) for one in seen] == [("star", "green"), ("ring", "black")]
    assert (seen[1].x, seen[1].y) == (pytest.approx(140, abs=1.5), pytest.approx(30, abs=1.5))


def test_pictures_of_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    scene = draw(1, seed=6)[0]
    assert not judge(scene, noise).things
    assert look(np.full((128, 128, 3), 250, np.uint8)) == ("white", ())


@pytest.mark.parametrize("strength", [4, 8])
def test_a_little_noise_is_forgiven(strength: int) -> None:
    """A decoder's pictures are not as clean as rendered ones."""
    random = np.random.default_rng(0)

    def paint(_: int, scene: Scene) -> Picture:
        noisy = render(scene) + random.normal(0, strength, (scene.height, scene.width, 3))
        return noisy.clip(0, 255).round().astype(np.uint8)

    assert score(draw(200, seed=7), paint).things >= 0.98
