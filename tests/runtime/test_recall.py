"""Forms: what a row reaches back to, on random samples."""

import numpy as np
import pytest

from allaprima.runtime.samplers.recall import NOISE, PREDICTION, SAMPLE, SLOTS, carried, echoes, past


def test_a_form_means_the_same_after_a_call() -> None:
    random = np.random.default_rng(0)
    known = random.standard_normal(4 + SLOTS)  # sample, prediction, noise, history, last noise
    row = random.standard_normal(4 + SLOTS)
    form = random.standard_normal(4 + SLOTS)
    form[-2:] = form[0] / row[0] * row[-2:]  # nothing of what is dropped
    after = np.array([row @ known, np.nan, np.nan, known[1], *known[3:-2], known[2]])
    later = carried(form, row)
    assert later[1] == later[2] == 0
    there = [0, *range(3, 4 + SLOTS)]
    assert later[there] @ after[there] == pytest.approx(form @ known)


def test_echoes_of_noise() -> None:
    rows = np.stack([SAMPLE + 2 * NOISE, SAMPLE])
    rows[0, -1] = 3
    assert echoes(rows).tolist() == [1.5, 0]


def test_names_of_places() -> None:
    assert np.array_equal(past(0), PREDICTION)
    assert [int(form.argmax()) for form in (SAMPLE, PREDICTION, NOISE, past(1), past(4))] == [0, 1, 2, 3, 6]
