"""Prompts in chunks of 77 ids, of a tokenizer in which every letter is a token."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allaprima.bundle import Bundle
from allaprima.runtime.chunks import Chunk, apply_weights, make_chunks, pad_chunks
from allaprima.runtime.tokenizer import Tokenizer

from .conftest import BOS, EOS


@pytest.fixture
def tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer(bundle)


def sizes(tokenizer: Tokenizer, prompt: str, *, weighted: bool = False) -> list[int]:
    """Of every chunk the number of tokens between begin and end."""
    made = make_chunks(tokenizer, prompt, long=True, weighted=weighted)
    assert made.truncated == ""
    found = []
    for chunk in made.chunks:
        assert chunk.ids.shape == (77,)
        assert chunk.ids[0] == BOS
        end = int(np.argmax(chunk.ids == EOS))
        assert np.all(chunk.ids[end:] == EOS)
        found.append(end - 1)
    return found


def tokens(chunks: tuple[Chunk, ...]) -> list[int]:
    return [int(id) for chunk in chunks for id in chunk.ids if id not in (BOS, EOS)]


def words(*lengths: int) -> str:
    return " ".join("x" * length for length in lengths)


@pytest.mark.parametrize("prompt", ["", "a red circle", "a, b", words(75), words(40, 40)])
def test_what_fits_is_as_ever(tokenizer: Tokenizer, prompt: str) -> None:
    plain = make_chunks(tokenizer, prompt)
    assert plain.chunks[0].ids.tolist() == tokenizer.encode(prompt).ids.tolist()
    weighted = make_chunks(tokenizer, prompt, weighted=True)
    assert weighted.truncated == plain.truncated == tokenizer.encode(prompt).truncated
    long = make_chunks(tokenizer, prompt, long=True, weighted=True)
    for other in (weighted, long):
        assert other.chunks[0].ids.tolist() == plain.chunks[0].ids.tolist()
        assert other.chunks[0].weights is None
    assert len(long.chunks) == (2 if prompt == words(40, 40) else 1)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("", [0]),
        (words(75), [75]),
        (words(76), [75, 1]),
        (words(150), [75, 75]),
        (words(151), [75, 75, 1]),
        ("x" * 60 + "," + "y" * 20, [61, 20]),  # the chunk ends at the comma
        ("x" * 55 + "," + "y" * 20, [56, 20]),
        ("x" * 54 + "," + "y" * 20, [75]),
        ("x" * 54 + "," + "y" * 21, [75, 1]),  # 20 tokens after it are the most
        ("x" * 74 + "," + "y", [75, 1]),
        ("x" * 75 + "," + "y", [75, 2]),
        ("x" * 60 + "," + "y" * 5 + " , " + "z" * 20, [67, 20]),  # the last comma
        ("x" * 70 + "," + "y" * 70 + "," + "z" * 70, [71, 71, 70]),
        ("x" * 70 + "," + "y" * 80, [71, 75, 5]),  # the first comma does not count twice
        ("a BREAK b", [1, 1]),
        ("BREAK a", [0, 1]),
        ("a BREAK BREAK b", [1, 0, 1]),
        ("a BREAK", [1]),
        ("BREAK", [0]),
        (words(75) + " BREAK b", [75, 1]),
        (words(76) + " BREAK b", [75, 1, 1]),
        ("x" * 70 + ", BREAK" + "y" * 10, [71, 15]),
    ],
)
def test_chunks(tokenizer: Tokenizer, prompt: str, wanted: list[int]) -> None:
    assert sizes(tokenizer, prompt) == wanted


def test_a_break_in_brackets_is_one(tokenizer: Tokenizer) -> None:
    assert sizes(tokenizer, "(a BREAK bc:1.5)", weighted=True) == [1, 2]
    first, second = make_chunks(tokenizer, "(a BREAK bc:1.5)", long=True, weighted=True).chunks
    assert first.weights is not None
    assert second.weights is not None
    assert first.weights.tolist() == [1, 1.5, *[1] * 75]
    assert second.weights.tolist() == [1, 1.5, 1.5, *[1] * 74]


def test_syntax_is_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    prompt = "(a:2) BREAK [b]"
    (chunk,) = make_chunks(tokenizer, prompt).chunks
    assert tokens((chunk,)) == tokenizer.split(prompt)[0]
    (chunk,) = make_chunks(tokenizer, prompt, weighted=True).chunks
    assert tokens((chunk,)) == tokenizer.split("a BREAK b")[0]
    chunks = make_chunks(tokenizer, prompt, long=True).chunks
    assert tokens(chunks) == tokenizer.split("(a:2) [b]")[0]


@pytest.mark.parametrize(
    ("prompt", "truncated"),
    [
        ("(" + words(70) + ":2) " + words(5), ""),
        ("(" + words(70) + ":2) " + words(5) + " (and:3) More", "and More"),
        ("(" + words(75) + ":2) B (and:3)", "B and"),
        ("(" + words(75, 1) + ":2)(and:3)", "xand"),
    ],
)
def test_what_was_cut(tokenizer: Tokenizer, prompt: str, truncated: str) -> None:
    assert make_chunks(tokenizer, prompt, weighted=True).truncated == truncated


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(alphabet="ab, \n"), st.integers(0, 400))
def test_nothing_is_lost(tokenizer: Tokenizer, text: str, repeats: int) -> None:
    prompt = text * (1 + repeats // (1 + len(text)))
    made = make_chunks(tokenizer, prompt, long=True)
    assert tokens(made.chunks) == tokenizer.split(prompt)[0]
    for chunk in made.chunks[:-1]:
        inside = [int(id) for id in chunk.ids[1:76]]
        count = inside.index(EOS) if EOS in inside else 75
        assert count == 75 or inside[count - 1] == tokenizer.comma
        assert count >= 56


def test_padding(tokenizer: Tokenizer) -> None:
    prompts = [make_chunks(tokenizer, prompt, long=True) for prompt in ("a", "a BREAK b BREAK c", "")]
    padded = pad_chunks(tokenizer, prompts, max(len(each.chunks) for each in prompts))
    assert [len(chunks) for chunks in padded] == [3, 3, 3]
    assert tokens(padded[0]) == tokenizer.split("a")[0]
    for chunk in (*padded[0][1:], *padded[2]):
        assert chunk.ids.tolist() == tokenizer.encode("").ids.tolist()
        assert chunk.weights is None


def test_weighing() -> None:
    random = np.random.default_rng(0)
    states = (random.standard_normal((77, 6)) + 1).astype(np.float32)
    weights = np.ones(77, np.float32)
    weights[3:5] = 1.5, -0.5
    weighed = states.copy()
    apply_weights(weighed, weights)
    assert weighed.mean() == pytest.approx(states.mean(), rel=1e-6)
    wanted = states * weights[:, None]
    np.testing.assert_allclose(weighed, wanted * (states.mean() / wanted.mean()), rtol=1e-5)


def test_weighing_everything_away() -> None:
    states = np.ones((77, 6), np.float32)
    apply_weights(states, np.zeros(77, np.float32))
    assert not states.any()
