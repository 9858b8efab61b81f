"""The serving benchmark: its traffic, its figures, and one small run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from allaprima.benchmarks.serving import WAYS, draw_traffic, main, summarise


def test_traffic() -> None:
    traffic = draw_traffic([4, 8], 200, 64, 32, seed=1)
    assert draw_traffic([4, 8], 200, 64, 32, seed=1) == traffic
    assert draw_traffic([4, 8], 200, 64, 32, seed=2) != traffic
    assert 60 < traffic.steps.count(4) < 140
    request = traffic.request(3)
    assert (request.seed, request.num_inference_steps, request.height, request.width) == (
        3,
        traffic.steps[3],
        64,
        32,
    )


def test_figures() -> None:
    runs = [([1.0] * 90, 30.0), ([4.0] * 8 + [9.0] * 2, 20.0)]
    found = summarise("none", 0.8, runs, bound=4.0)
    assert (found.p50, found.p95, found.p99) == (1.0, 4.0, 9.0)
    assert (found.goodput, found.throughput) == (98 / 50, 2.0)


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "shapes --backend ort --size 32x32 --lanes 2 --steps 1 2 --loads 0.5 --queries 6 --rounds 2 --results"
    )
    main([*words.split(), str(tmp_path)])
    result = json.loads((tmp_path / "serving-shapes.json").read_text())
    assert [run["way"] for run in result["runs"]] == list(WAYS)
    assert all(run["p50"] <= run["p95"] <= run["p99"] for run in result["runs"])
    assert [set(each) for each in result["at_once"]] == [{"offline", *WAYS}] * 2
    assert min(result["alone"], *(rate for each in result["at_once"] for rate in each.values())) > 0
    assert "goodput" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0: give more than 0"),
        (["--lanes", "0"], "--lanes is 0: give more than 0"),
        (["--queries", "0"], "--queries is 0: give more than 0"),
        (["--loads", "0.5", "-1"], "-1.0 among --steps or --loads"),
        (["--steps", "0"], "0 among --steps or --loads"),
    ],
)
def test_bad_words(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["shapes", *arguments])
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"error: .*no-such"):
        main(["no-such"])
