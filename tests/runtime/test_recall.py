"""Forms: what a row reaches back to, on random samples."""

import numpy as np
import pytest

from allaprima.runtime.samplers.recall import NOISE, PREDICTION, SAMPLE, SLOTS, carried, past


def test_a_form_means_the_same_after_a_call() -> None:
    random = np.random.default_rng(0)
    known = random.standard_normal(3 + SLOTS)  # sample, prediction, noise, history
    row = random.standard_normal(3 + SLOTS)
    form = random.standard_normal(3 + SLOTS)
    form[2] = form[0] / row[0] * row[2]  # noise only as in the row
    form[-1] = form[0] / row[0] * row[-1]  # and nothing of what is dropped
    after = np.array([row @ known, np.nan, np.nan, known[1], *known[3:-1]])
    later = carried(form, row)
    assert later[1] == later[2] == 0
    assert later[[0, *range(3, 3 + SLOTS)]] @ after[[0, *range(3, 3 + SLOTS)]] == pytest.approx(form @ known)


def test_names_of_places() -> None:
    assert np.array_equal(past(0), PREDICTION)
    assert [int(form.argmax()) for form in (SAMPLE, PREDICTION, NOISE, past(1), past(4))] == [0, 1, 2, 3, 6]
