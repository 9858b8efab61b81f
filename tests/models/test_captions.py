"""Captions say what the scene shows: a reader who does not know the scene finds it in them again."""

import re
from dataclasses import replace

import numpy as np
import pytest

from allaprima.models.shapes.captions import (
    CLASSES,
    COLOUR_WORDS,
    ITS_SIDE,
    KIND_WORDS,
    NOTHING,
    PLACE_WORDS,
    RELATION_WORDS,
    SIZE_WORDS,
    caption,
    labels,
)
from allaprima.models.shapes.scenes import COLOURS, KINDS, OPPOSITE, PLACES, SIZES, Scene, Thing, draw_scene


def either(words: dict[str, str]) -> str:
    """A pattern for any of the words, the longest first, never a part of a word."""
    return r"\b(?:" + "|".join(sorted(map(re.escape, filter(None, words)), key=len, reverse=True)) + r")\b"


COLOUR = {word: name for name in COLOURS for word in COLOUR_WORDS.get(name, (name,))}
KIND = {word: name for name in KINDS for word in KIND_WORDS[name]}
SIZE = {word: name for name in SIZES for word in SIZE_WORDS[name]}
RELATION = {word: name for name, words in RELATION_WORDS.items() for word in words}
SIDE = {word: name for name, words in ITS_SIDE.items() for word in words}
NOUN = re.compile(
    rf"(?:(?P<size>{either(SIZE)}) )?(?P<kind>{either(KIND)}) (?:that is|colored|in) "
    rf"(?P<colour>{either(COLOUR)})"
    rf"|(?:(?P<size2>{either(SIZE)}) )?(?P<colour2>{either(COLOUR)}) (?:(?P<size3>{either(SIZE)}) )?"
    rf"(?P<kind2>{either(KIND)})"
)
GROUND = re.compile(
    rf"(?P<before>{either(COLOUR)}) (?:background|backdrop)"
    rf"|(?:background|backdrop) is (?P<after>{either(COLOUR)})"
)
Facts = tuple[str, str, str]


def read_things(text: str) -> list[Facts]:
    found = []
    for match in NOUN.finditer(text):
        part = match.groupdict()
        size = part["size"] or part["size2"] or part["size3"] or ""
        kind, colour = part["kind"] or part["kind2"], part["colour"] or part["colour2"]
        found.append((KIND[kind], COLOUR[colour], SIZE.get(size, "medium")))
    return found


def read_relation(text: str) -> str | None:
    """Where the thing named first lies, seen from the one named second."""
    if side := re.search(either(SIDE), text):
        return OPPOSITE[SIDE[side[0]]]  # the second lies at its side
    if word := re.search(either(RELATION), text):
        noun = NOUN.search(text)
        assert noun
        relation = RELATION[word[0]]
        return OPPOSITE[relation] if word.start() < noun.start() else relation
    return None


def facts(thing: Thing) -> Facts:
    return thing.kind, thing.colour, thing.size


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Scene, str]]:
    random = np.random.default_rng(0)
    scenes = [draw_scene(random) for _ in range(3000)]
    return [(scene, caption(scene, random).lower()) for scene in scenes]


def test_every_thing_is_named(pairs: list[tuple[Scene, str]]) -> None:
    for scene, text in pairs:
        assert sorted(read_things(text)) == sorted(map(facts, scene.things)), text


def test_the_background_is_named_unless_it_is_white(pairs: list[tuple[Scene, str]]) -> None:
    for scene, text in pairs:
        found = GROUND.search(text)
        assert found or scene.background == "white", text
        if found:
            assert COLOUR[found["before"] or found["after"]] == scene.background, text


def test_relations_are_told_right_whichever_way(pairs: list[tuple[Scene, str]]) -> None:
    turned = 0
    for scene, text in pairs:
        relation = read_relation(text)
        if scene.relation is None:
            assert relation is None or scene.place, text
            continue
        first, second = map(facts, scene.things)
        if first == second:
            continue
        named = read_things(text)
        assert named in ([first, second], [second, first])
        turned += named == [second, first]
        assert relation == (scene.relation if named == [first, second] else OPPOSITE[scene.relation]), text
    assert turned > 500


def test_places_are_named(pairs: list[tuple[Scene, str]]) -> None:
    for scene, text in pairs:
        if scene.place == "center":
            assert re.search(r"\b(center|centre|middle)\b", text), text
        elif scene.place:
            for word in scene.place.split():
                assert re.search(either(dict.fromkeys(PLACE_WORDS.get(word, (word,)), "")), text), text


def test_captions_are_varied(pairs: list[tuple[Scene, str]]) -> None:
    random = np.random.default_rng(1)
    things = (Thing("circle", "red", "small", 40, 40, 15), Thing("square", "gray", "medium", 40, 90, 20))
    scene = Scene(128, 128, "orange", things, relation="above")
    assert len({caption(scene, random) for _ in range(300)}) > 250


def test_grammar(pairs: list[tuple[Scene, str]]) -> None:
    for _, text in pairs:
        assert not re.search(r"\b(an [^aeiou]|a [aeiou])|  | ,|,,|\.\.", text), text
        assert text == text.strip()


def test_the_same_stream_gives_the_same_words(pairs: list[tuple[Scene, str]]) -> None:
    for scene, _ in pairs[:20]:
        assert len({caption(scene, np.random.default_rng(5)) for _ in range(3)}) == 1


def row(thing: Thing) -> tuple[int, int, int]:
    return KINDS.index(thing.kind) + 1, COLOURS.index(thing.colour) + 1, SIZES.index(thing.size) + 1


A = Thing("circle", "red", "small", 40.0, 40.0, 15.0)
B = Thing("heart", "gray", "large", 40.0, 90.0, 20.0)


@pytest.mark.parametrize(
    ("relation", "arrangement", "first"),
    [("above", 3, A), ("below", 3, B), ("left of", 2, A), ("right of", 2, B), (None, 4, A)],
)
def test_labels_of_a_pair(relation: str | None, arrangement: int, first: Thing) -> None:
    """The upper or the left one is the first, however it is said."""
    found = labels(Scene(128, 128, "cyan", (A, B), relation=relation))
    second = B if first is A else A
    assert found.things == (row(first), row(second))
    assert (found.arrangement, found.background, found.place) == (arrangement, COLOURS.index("cyan") + 1, 0)
    if relation is not None:
        assert labels(Scene(128, 128, "cyan", (B, A), relation=OPPOSITE[relation])) == found


def test_labels_of_one() -> None:
    scene = Scene(128, 128, "white", (A,), place="top left")
    found = labels(scene)
    assert (found.arrangement, found.things, found.place) == (
        1,
        (row(A), (0, 0, 0)),
        PLACES.index("top left") + 1,
    )
    assert labels(replace(scene, place=None)).place == 0


def test_labels_are_classes(pairs: list[tuple[Scene, str]]) -> None:
    rows = np.array([labels(scene).flat() for scene, _ in pairs])
    assert rows.shape[1] == len(CLASSES) == len(NOTHING.flat())
    assert (rows >= 0).all()
    assert (rows < np.array(CLASSES)).all()
    assert set(NOTHING.flat()) == {0}
