"""FID and CLIP score against their definitions, and MLPerf's gate."""

from pathlib import Path

import numpy as np
import pytest
from scipy import linalg

from allaprima.benchmarks.fidelity import (
    MLPERF_SDXL,
    Statistics,
    clip_score,
    frechet_distance,
    judge,
    read_statistics,
    statistics_of,
)
from allaprima.bundle import RequestError


def draw(count: int, width: int, seed: int) -> np.ndarray:
    """Features that depend on each other, as those of pictures do."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(width, width))
    return random.normal(size=(count, width)) @ mixed + random.normal(size=width)


def reference(one: np.ndarray, other: np.ndarray) -> float:
    """The definition as pytorch-fid and MLPerf compute it, by the root of a general matrix."""
    means = [each.mean(0) for each in (one, other)]
    covariances = [np.cov(each, rowvar=False) for each in (one, other)]
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    apart = means[0] - means[1]
    return float(
        apart @ apart + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root).real
    )


@pytest.mark.parametrize(("count", "width"), [(500, 8), (300, 64), (200, 1)])
def test_the_distance_is_that_of_the_definition(count: int, width: int) -> None:
    one, other = draw(count, width, 1), draw(count + 50, width, 2)
    expected = (
        reference(one, other)
        if width > 1
        else float((one.mean() - other.mean()) ** 2 + (one.std(ddof=1) - other.std(ddof=1)) ** 2)
    )
    assert frechet_distance(statistics_of(one), statistics_of(other)) == pytest.approx(expected, rel=1e-6)


def test_the_distance_of_independent_features_is_known() -> None:
    """Diagonal covariances: the sum of squares of what means and deviations differ by."""
    one = Statistics(np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    other = Statistics(np.array([0.0, 5.0]), np.diag([1.0, 25.0]))
    assert frechet_distance(one, other) == pytest.approx(1 + 9 + (2 - 1) ** 2 + (3 - 5) ** 2)


def test_fewer_pictures_than_features_have_a_distance_too() -> None:
    """Their covariance is singular, where the root of a general matrix needs care."""
    one, other = statistics_of(draw(20, 64, 1)), statistics_of(draw(30, 64, 2))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6 * np.trace(one.covariance))
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-6)


def test_statistics_of_a_file(tmp_path: Path) -> None:
    features = draw(50, 4, 3)
    np.savez(tmp_path / "reference.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    assert frechet_distance(read_statistics(tmp_path / "reference.npz"), statistics_of(features)) < 1e-9


def test_files_that_are_no_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}]), sigma=np.zeros(1))
    (tmp_path / "text.npz").write_text("no")
    for name in ("other", "pickled", "text", "missing"):
        with pytest.raises(RequestError, match=f"{name}.npz holds no statistics"):
            read_statistics(tmp_path / f"{name}.npz")
    with pytest.raises(RequestError, match=r"\(3,\) and \(2, 2\)"):
        read_statistics(tmp_path / "odd.npz")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((1, 4)), "2 pictures or more"),
        (np.zeros(4), "2 pictures or more"),
        (np.array([[0.0], [np.nan]]), "not finite"),
    ],
)
def test_features_without_statistics(features: np.ndarray, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        statistics_of(features)


def test_features_of_different_models() -> None:
    with pytest.raises(RequestError, match="4 and 8 numbers"):
        frechet_distance(statistics_of(draw(9, 4, 1)), statistics_of(draw(9, 8, 1)))


def test_clip_score() -> None:
    pictures = [[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]
    texts = [[5.0, 0.0], [0.0, -1.0], [1.0, 0.0]]
    assert clip_score(pictures, texts) == pytest.approx(100 * (1 - 1 + 0.5**0.5) / 3)


@pytest.mark.parametrize(
    ("pictures", "texts", "message"),
    [
        ([[1.0, 2.0]], [[1.0]], "no pairs"),
        ([], [], "no pairs"),
        ([[0.0, 0.0]], [[1.0, 0.0]], "length 0"),
        ([[np.nan, 0.0]], [[1.0, 0.0]], "not finite"),
    ],
)
def test_embeddings_without_a_score(
    pictures: list[list[float]], texts: list[list[float]], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        clip_score(pictures, texts)


@pytest.mark.parametrize(
    ("samples", "fid", "clip", "passed", "reason"),
    [
        (5000, 23.5, 31.75, True, ""),
        (5000, 23.01085758, 31.81331801, True, ""),
        (5000, 23.0, 31.75, False, "FID 23.0000 is outside"),
        (5000, 24.0, 31.0, False, "CLIP score 31.0000 is outside"),
        (4999, 23.5, 31.75, None, "for 5000 pictures, not 4999"),
        (5000, None, 31.75, None, "needs the FID"),
        (5000, None, None, None, "needs the FID and the CLIP score"),
    ],
)
def test_the_gate(
    samples: int, fid: float | None, clip: float | None, passed: bool | None, reason: str
) -> None:
    found, why = judge(MLPERF_SDXL, samples, fid, clip)
    assert found is passed
    assert reason in why if reason else why == ""
