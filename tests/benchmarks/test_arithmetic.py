"""From seconds to what is reported."""

from pathlib import Path

import pytest
from PIL import Image

from allaprima.benchmarks.report import table
from allaprima.benchmarks.trials import Spread, Trial, psnr, spread, summarise


def test_fixed_costs_fall_out_of_a_step() -> None:
    fixed, step = 3.0, 0.5
    trial = Trial(few=(fixed + 2 * step,) * 2, many=(fixed + 20 * step,) * 2, memory=1)
    summary = summarise([trial], (2, 20))
    assert summary.step == Spread(step, step, step)
    assert summary.picture.median == fixed + 20 * step


def test_a_pair_is_painted_in_one_process_so_pairs_are_not_mixed() -> None:
    slow, quick = Trial((10.0,), (20.0,), memory=5), Trial((1.0,), (6.0,), memory=7)
    summary = summarise([slow, quick], (5, 10))
    assert summary.step == Spread(1.5, 1.0, 2.0)
    assert summary.picture == Spread(13.0, 6.0, 20.0)
    assert summary.memory == 7


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0, 10.0]) == Spread(median=2.5, minimum=1.0, maximum=10.0)


@pytest.mark.parametrize(
    ("one", "other", "decibels"),
    [
        ((7, 7, 7), (7, 7, 7), 99.0),
        ((0, 0, 0), (255, 255, 255), 0.0),
        ((100, 100, 100), (101, 101, 101), 48.1308),
    ],
)
def test_psnr(
    tmp_path: Path, one: tuple[int, int, int], other: tuple[int, int, int], decibels: float
) -> None:
    for name, colour in {"one": one, "other": other}.items():
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    assert psnr(tmp_path / "one.png", tmp_path / "other.png") == pytest.approx(decibels, abs=1e-3)


def test_pictures_of_different_sizes_have_nothing_in_common(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "other.png")
    assert psnr(tmp_path / "one.png", tmp_path / "other.png") == 0.0


def test_table() -> None:
    assert table(("a", "b"), [("x", "1"), ("y", "2")]) == [
        "| a | b |",
        "| :-- | --: |",
        "| x | 1 |",
        "| y | 2 |",
    ]
