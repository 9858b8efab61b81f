"""Captions: varied natural English for a scene, and what a reader should take from it as labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from allaprima.models.shapes.scenes import COLOURS, KINDS, OPPOSITE, PLACES, SIZES, Scene, Thing

COLOUR_WORDS = {
    "gray": ("gray", "gray", "grey"),
    "purple": ("purple", "purple", "violet"),
    "cyan": ("cyan", "cyan", "turquoise"),
}
KIND_WORDS = {
    "circle": ("circle", "circle", "disc", "disk", "dot"),
    "square": ("square", "square", "box"),
    "ring": ("ring", "ring", "hoop", "donut"),
    "cross": ("cross", "cross", "plus sign", "plus"),
    "star": ("star", "star", "five-pointed star"),
    "diamond": ("diamond", "diamond", "rhombus"),
    "triangle": ("triangle",),
    "heart": ("heart", "heart", "heart shape"),
}
SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "medium": ("", "", "", "medium-sized"),
}
RELATION_WORDS = {
    "above": ("above", "above", "over", "on top of", "higher than"),
    "below": ("below", "below", "under", "beneath", "underneath", "lower than"),
    "left of": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of"),
}
ITS_SIDE = {
    "above": ("above it", "over it"),
    "below": ("below it", "under it", "beneath it"),
    "left of": ("to its left", "on its left", "to the left of it"),
    "right of": ("to its right", "on its right", "to the right of it"),
}
PLACE_WORDS = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}
LEADS = ("a picture of", "an image of", "a drawing of", "a painting of", "an illustration of", "there is")


@dataclass(frozen=True)
class Labels:
    """What a caption says, as class indices; 0 stands for "not said" or "nothing there".

    Of two related things the first is the upper or the left one, whichever way the caption is worded; of an
    unrelated pair the one named first.
    """

    background: int
    arrangement: int
    things: tuple[tuple[int, int, int], tuple[int, int, int]]
    place: int

    def flat(self) -> tuple[int, ...]:
        """All indices in the order of `CLASSES`."""
        return (self.background, self.arrangement, *self.things[0], *self.things[1], self.place)


_THING = (len(KINDS) + 1, len(COLOURS) + 1, len(SIZES) + 1)
CLASSES = (len(COLOURS) + 1, 5, *_THING, *_THING, len(PLACES) + 1)
"""Number of classes of each label. Arrangements: nothing, single, side by side, one above the other, and an
unrelated pair."""
NOTHING = Labels(0, 0, ((0, 0, 0), (0, 0, 0)), 0)


def labels(scene: Scene) -> Labels:
    """What every caption of the scene says."""
    things = scene.things
    arrangement = 1 if len(things) == 1 else 4
    if scene.relation is not None:
        arrangement = 2 if scene.relation in ("left of", "right of") else 3
        if scene.relation in ("below", "right of"):
            things = things[::-1]
    rows = [(KINDS.index(t.kind) + 1, COLOURS.index(t.colour) + 1, SIZES.index(t.size) + 1) for t in things]
    rows += [(0, 0, 0)] * (2 - len(rows))
    place = PLACES.index(scene.place) + 1 if scene.place else 0
    return Labels(COLOURS.index(scene.background) + 1, arrangement, (rows[0], rows[1]), place)


def caption(scene: Scene, random: np.random.Generator) -> str:
    """One of many wordings. A white background may go unsaid; every other fact of the scene is named."""
    terse = random.random() < 0.12
    body = _alone(scene, random, terse) if len(scene.things) == 1 else _pair(scene, random, terse)
    if body.startswith(("a ", "an ")) and " is " not in body and random.random() < 0.2:
        body = f"{random.choice(LEADS)} {body}"
    if scene.background != "white" or random.random() < 0.4:
        body = _with_background(body, _colour(scene.background, random), random, terse)
    body = body[0].upper() + body[1:] if random.random() < 0.2 else body
    return body + "." if random.random() < 0.15 else body


def _alone(scene: Scene, random: np.random.Generator, terse: bool) -> str:
    noun = _noun(scene.things[0], random, terse, definite=False)
    if scene.place is None:
        return noun
    where = _place(scene.place, random, terse)
    return f"{where}, {noun}" if random.random() < 0.2 else f"{noun}{',' if terse else ''} {where}"


def _place(place: str, random: np.random.Generator, terse: bool) -> str:
    if place == "center":
        middle = random.choice(("center", "centre", "middle"))
        return str(middle) if terse else f"in the {middle}"
    words = " ".join(str(random.choice(PLACE_WORDS.get(word, (word,)))) for word in place.split())
    if terse:
        return words
    if " " in words:
        return f"in the {words}{random.choice((' corner', ''))}"
    if place in ("left", "right"):
        return f"{random.choice(('on', 'at'))} the {place}{random.choice((' side', ' edge', ''))}"
    return f"at the {place}"


def _pair(scene: Scene, random: np.random.Generator, terse: bool) -> str:
    first, second = scene.things
    relation = scene.relation
    if relation is not None and random.random() < 0.5:
        first, second, relation = second, first, OPPOSITE[relation]
    a, b = _noun(first, random, terse, definite=False), _noun(second, random, terse, definite=False)
    if relation is None:
        link = ", " if terse else str(random.choice((" and ", " and ", " with ", " next to ", " beside ")))
        return f"{a}{link}{b}"
    word = str(random.choice(RELATION_WORDS[relation]))
    form = 0 if terse else int(random.integers(6))
    if form == 2:
        return f"{a} is {word} {b}"
    if form == 3:
        return f"{word} {_noun(second, random, terse, definite=bool(random.random() < 0.5))} is {a}"
    if form == 4:
        return f"{a} with {b} {random.choice(ITS_SIDE[OPPOSITE[relation]])}"
    if form == 5:
        return f"{a} and {random.choice(ITS_SIDE[OPPOSITE[relation]])} {b}"
    return f"{a} {word} {b}"


def _noun(thing: Thing, random: np.random.Generator, terse: bool, definite: bool) -> str:
    size = str(random.choice(SIZE_WORDS[thing.size]))
    colour = _colour(thing.colour, random)
    kind = str(random.choice(KIND_WORDS[thing.kind]))
    swap = bool(size) and random.random() < 0.15
    words = [colour, size, kind] if swap else [size, colour, kind]
    if not terse and random.random() < 0.08:
        words = [size, kind, f"{random.choice(('that is', 'colored', 'in'))} {colour}"]
    phrase = " ".join(word for word in words if word)
    if terse:
        return phrase
    return ("the " if definite else _article(phrase)) + phrase


def _article(phrase: str) -> str:
    return "an " if phrase[0] in "aeiou" else "a "


def _colour(name: str, random: np.random.Generator) -> str:
    return str(random.choice(COLOUR_WORDS.get(name, (name,))))


def _with_background(body: str, colour: str, random: np.random.Generator, terse: bool) -> str:
    ground = str(random.choice(("background", "background", "backdrop")))
    if terse:
        return f"{body}, {colour} {ground}"
    phrase = f"{_article(colour)}{colour} {ground}"
    form = int(random.integers(6))
    if form == 0:
        return f"{random.choice(('on', 'against'))} {phrase}, {body}"
    if form == 1:
        return f"{body}, {colour} {ground}"
    if form == 2:
        return f"{body} against {phrase}"
    if form == 3:
        return f"{body}, the {ground} is {colour}"
    return f"{body} on {phrase}"
