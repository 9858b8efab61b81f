"""The syntax of prompts: weighted words, and breaks between chunks, as the usual web interfaces read them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

STEP = 1.1
"""What a pair of round brackets multiplies by, and a pair of square brackets divides by."""
LIMIT = 1e3
"""The largest weight there is: hundreds of nested brackets stay finite."""
_HUGE = 1e300
_DEEP = 5000

# Possessive quantifiers: no backtracking, so the work is linear in the text.
_NUMBER = r"[+-]?+(?:[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++)"
_TOKEN = re.compile(
    rf"\\(?P<escaped>[()\[\]\\]?)|(?P<bracket>[()\[\]])|:\s*+(?P<weight>{_NUMBER})\s*+\)|[^\\()\[\]:]++|:",
    re.DOTALL,
)
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True)
class Span:
    """A part of a prompt whose words weigh the same; 1 is as written."""

    text: str
    weight: float = 1.0


@dataclass
class _Part:
    """A stretch of text with the brackets that open and close before it.

    `opened` are the explicit weights of round brackets, 1 for those without; `closed` counts those that end;
    `steps` is the change of the exponent of STEP.
    """

    text: str = ""
    opened: list[float] = field(default_factory=list)
    closed: int = 0
    steps: int = 0


def parse_weights(prompt: str) -> tuple[Span, ...]:
    """The prompt without its weighting syntax, in spans of one weight, neighbours of different weights.

    `(word)` weighs 1.1, `[word]` 1 / 1.1, `(word:1.3)` 1.3; nested weights multiply. A backslash before a
    bracket or a backslash takes it literally, any other backslash is dropped. A bracket that is never closed
    reaches to the end, one that was never opened is text, and so is a weight without a round bracket.
    Weights end at ±LIMIT. Takes any text, in linear time; an empty prompt is one empty span.
    """
    spans: list[Span] = []
    products = [1.0]
    exponent = 0
    texts: list[str] = []
    weight = 1.0
    for part in _split(prompt):
        del products[len(products) - part.closed :]
        for factor in part.opened:
            products.append(max(-_HUGE, min(products[-1] * factor, _HUGE)))
        exponent += part.steps
        if not part.text:
            continue
        found = max(-LIMIT, min(products[-1] * STEP ** max(-_DEEP, min(exponent, _DEEP)), LIMIT))
        if texts and found != weight:
            spans.append(Span("".join(texts), weight))
            texts = []
        weight = found
        texts.append(part.text)
    return (*spans, Span("".join(texts), weight))


def split_breaks(text: str) -> tuple[str, ...]:
    """The text between the words BREAK, without the white space around them."""
    parts = _BREAK.split(text)
    for k in range(1, len(parts)):
        parts[k - 1], parts[k] = parts[k - 1].rstrip(), parts[k].lstrip()
    return tuple(parts)


def _split(prompt: str) -> list[_Part]:
    """Text and brackets, matched.

    Round brackets close round ones and square brackets square ones, whatever lies between; so the weights of
    round brackets nest and can be kept as a stack, while square brackets only count.
    """
    parts = [_Part()]
    rounds: list[tuple[_Part, int]] = []  # where a bracket opened, and which of that part's it is
    squares: list[_Part] = []
    for token in _TOKEN.finditer(prompt):
        text, bracket, weight = token[0], token["bracket"], token["weight"]
        part = parts[-1]
        if bracket == "(":
            part.opened.append(1.0)
            part.steps += 1
            rounds.append((part, len(part.opened) - 1))
        elif bracket == "[":
            part.steps -= 1
            squares.append(part)
        elif bracket == "]" and squares:
            squares.pop()
            parts.append(_Part(steps=1))
        elif (bracket == ")" or weight) and rounds:
            opener, index = rounds.pop()
            if weight:
                opener.opened[index] = max(-_HUGE, min(float(weight), _HUGE))
                opener.steps -= 1
            parts.append(_Part(closed=1, steps=0 if weight else -1))
        else:
            part.text = text if token["escaped"] is None else token["escaped"]
            parts.append(_Part())
    return parts
