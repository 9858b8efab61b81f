"""The syntax of prompts."""

import sys
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allaprima.runtime.prompts import LIMIT, Span, parse_weights, split_breaks

ANYTHING = st.text() | st.text(alphabet="()[]\\:.,0123456789+- ab\nBREAK")


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("", [("", 1)]),
        ("a red circle", [("a red circle", 1)]),
        ("a: 1.5, b", [("a: 1.5, b", 1)]),
        ("a (red) circle", [("a ", 1), ("red", 1.1), (" circle", 1)]),
        ("a [red] circle", [("a ", 1), ("red", 1 / 1.1), (" circle", 1)]),
        ("a (red:1.3) circle", [("a ", 1), ("red", 1.3), (" circle", 1)]),
        ("(red: 0.5 )", [("red", 0.5)]),
        ("(red:.5)(blue:2.)", [("red", 0.5), ("blue", 2)]),
        ("(red:-1)(blue:+2)", [("red", -1), ("blue", 2)]),
        ("(red:0)", [("red", 0)]),
        ("((red))", [("red", 1.21)]),
        ("(((red)))", [("red", 1.331)]),
        ("[[red]]", [("red", 1 / 1.21)]),
        ("([red])", [("red", 1)]),
        ("a (b (c) d) e", [("a ", 1), ("b ", 1.1), ("c", 1.21), (" d", 1.1), (" e", 1)]),
        ("(a (b:2) c:3)", [("a ", 3), ("b", 6), (" c", 3)]),
        ("(a [b:2) c]", [("a ", 2), ("b", 2 / 1.1), (" c", 1 / 1.1)]),  # they need not nest in each other
        ("[a (b] c:2)", [("a ", 1 / 1.1), ("b", 2 / 1.1), (" c", 2)]),
        (r"a \(b\) \[c\] \\", [(r"a (b) [c] " + "\\", 1)]),
        (r"(a\):1.5)", [("a)", 1.5)]),
        ("a\\b \\", [("ab ", 1)]),
        ("a (b", [("a ", 1), ("b", 1.1)]),
        ("a ((b) c", [("a ", 1), ("b", 1.21), (" c", 1.1)]),
        ("a [b", [("a ", 1), ("b", 1 / 1.1)]),
        ("a) b] c:1.2) d", [("a) b] c:1.2) d", 1)]),
        ("[a:1.2)]", [("a:1.2)", 1 / 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:)", [("a:", 1.1)]),
        ("(a:1.2:1.3)", [("a:1.2", 1.3)]),
        ("()[](:2)", [("", 1)]),
        ("(a)(b)", [("ab", 1.1)]),
        ("(a\nb:1.5)\tc", [("a\nb", 1.5), ("\tc", 1)]),
        ("(東京:1.2)", [("東京", 1.2)]),
        ("(a:" + "9" * 400 + ")", [("a", LIMIT)]),
        ("((a:-" + "9" * 400 + "):0)", [("a", 0)]),
        ("(" * 200 + "a", [("a", LIMIT)]),
    ],
)
def test_weights(prompt: str, spans: list[tuple[str, float]]) -> None:
    found = parse_weights(prompt)
    assert [span.text for span in found] == [text for text, _ in spans]
    assert [span.weight for span in found] == pytest.approx([weight for _, weight in spans])


@given(ANYTHING)
def test_any_text_keeps_its_words(prompt: str) -> None:
    spans = parse_weights(prompt)
    kept = iter(prompt)
    text = "".join(span.text for span in spans)
    assert all(letter in kept for letter in text)  # in order, nothing new
    for letter in set(prompt) - set("()[]\\:.+-0123456789 \n\t\r\f\v") - {c for c in prompt if c.isspace()}:
        assert text.count(letter) == prompt.count(letter)
    assert all(-LIMIT <= span.weight <= LIMIT for span in spans)
    assert all(one.weight != two.weight for one, two in pairwise(spans))


@given(ANYTHING)
def test_escaped_text_is_itself(text: str) -> None:
    escaped = "".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in text)
    assert parse_weights(escaped) == (Span(text),)
    if text and ":" not in text:
        assert parse_weights(f"({escaped})") == (Span(text, 1.1),)
    if text:
        assert parse_weights(f"({escaped}:1.5)") == (Span(text, 1.5),)


@pytest.mark.parametrize("unit", ["(", "[", "(a", "(a)", "[(a]", "(a:2", "(a:2)", ": ", ":1 ", "\\"])
def test_work_grows_with_the_text(unit: str) -> None:
    def count(text: str) -> int:
        lines = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal lines
            lines += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            parse_weights(text)
        finally:
            sys.settrace(before)
        return lines

    few, many = count(unit * 500), count(unit * 5000)
    assert few > 500
    assert many <= 10.5 * few


@pytest.mark.parametrize("unit", ["(", "[", ")", "(a:2)", ":", ": ", ":1", ":1 ", " ", "\\", "([", "(:1 "])
def test_much_of_everything(unit: str) -> None:
    spans = parse_weights(unit * 100_000 + "end")  # quadratic work would take minutes
    assert spans[-1].text.endswith("end")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [""]),
        (" a ", [" a "]),
        ("a BREAK b", ["a", "b"]),
        (" a\nBREAK\n\nBREAK b ", [" a", "", "b "]),
        ("BREAK", ["", ""]),
        ("BREAKS break aBREAK BREAK_", ["BREAKS break aBREAK BREAK_"]),
        ("a,BREAK,b", ["a,", ",b"]),
    ],
)
def test_breaks(text: str, parts: list[str]) -> None:
    assert split_breaks(text) == tuple(parts)
