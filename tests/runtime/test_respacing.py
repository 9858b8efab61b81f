"""Sigmas spaced by a rule, against SciPy."""

import numpy as np
import pytest
import scipy.stats

from allaprima.runtime.respacing import beta_quantile, beta_sigmas


def test_beta_quantile_of_scipy() -> None:
    probability = np.concatenate([[0, 1e-12, 1 - 1e-12, 1], np.linspace(0, 1, 1001)])
    for shape in (0.6, 0.3, 0.9):
        expected = scipy.stats.beta.ppf(probability, shape, shape)
        np.testing.assert_allclose(beta_quantile(probability, shape), expected, rtol=1e-10, atol=1e-15)
    assert beta_sigmas(0.1, 5.0, 3).tolist() == pytest.approx([5.0, 2.55, 0.1])
