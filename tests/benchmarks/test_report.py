"""The result on disk, and the report and plots that are made of it."""

import copy
import json
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest

from allaprima.benchmarks import plots
from allaprima.benchmarks.comparison import missing
from allaprima.benchmarks.page import write_report
from allaprima.benchmarks.plan import Work
from allaprima.benchmarks.plots import looks_of, plot_all
from allaprima.benchmarks.report import RESULTS
from allaprima.benchmarks.result import SCHEMA, Result, read, turn_to_json, write
from allaprima.benchmarks.roofline import points
from allaprima.benchmarks.summary import against, costs, fits, rows
from allaprima.benchmarks.turns import Picture, Turn
from allaprima.bundle import RequestError


def test_a_result_comes_back(result: Result, tmp_path: Path) -> None:
    path = write(tmp_path / "new" / "folder", result)
    assert read(path) == read(path.parent) == json.loads(path.read_text())
    assert read(path)["contestants"]["slow"]["turns"][0]["pictures"][1]["seconds"] == [17.82] * 3
    assert '"seconds": [17.82, 17.82, 17.82]' in path.read_text()
    assert [each.name for each in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not JSON"),
        ("[1]", "is no result of allaprima bench"),
        ('{"contestants": {}}', "is no result of allaprima bench"),
        ('{"schema": 1}', "has the schema 1 of 'an older benchmark', not 2"),
        (f'{{"schema": {SCHEMA + 1}, "kind": "allaprima bench"}}', "has the schema 3"),
    ],
)
def test_what_is_no_result_of_ours(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(RequestError, match=why):
        read(path)


def test_no_file_and_no_folder(result: Result, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nothing\.json cannot be read"):
        read(tmp_path / "nothing.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be written"):
        write(tmp_path / "file", result)


def test_a_turn_in_a_result() -> None:
    works = Work(1, 8, 8, 2), Work(1, 8, 8, 4)
    pictures = [
        Picture(work, 1.0 + work.steps, 0.1, {"text": 0.5}, {"denoiser": (0.7, work.steps)})
        for work in (*works, *works)
    ]
    found = turn_to_json(Turn(1, 0.2, 3, None, pictures, True))
    assert found["warm_up"] == []
    assert [entry["steps"] for entry in found["pictures"]] == [2, 4]
    assert found["pictures"][1] == {
        "batch": 1,
        "width": 8,
        "height": 8,
        "steps": 4,
        "seconds": [5.0, 5.0],
        "png": [0.1, 0.1],
        "stages": {"text": [0.5, 0.5]},
        "engine": {"denoiser": {"seconds": [0.7, 0.7], "calls": 4}},
    }


def test_figures(result: Result) -> None:
    found = rows(result)
    assert [(row.contestant, row.work.steps) for row in found[:3]] == [
        ("quick", 1),
        ("quick", 4),
        ("quick", 8),
    ]
    row = found[1]
    assert (row.median, row.at(99), row.rate) == pytest.approx((9.0, 9.09, 1 / 9))
    assert row.by_round() == pytest.approx({0: 8.91, 1: 9.0, 2: 9.09})
    assert row.stages == pytest.approx({"text": 0.1, "denoise": 8.0, "decode": 0.2, "png": 0.001})
    assert row.overhead == pytest.approx(1 - 8.2 / 9)
    lines = {fit.contestant: fit.line for fit in fits(found)}
    assert (lines["slow"].fixed, lines["slow"].per_step) == pytest.approx((2.0, 4.0))
    ratios = against(found, "quick")
    assert len(ratios) == 3
    for interval in ratios.values():
        assert (interval.ratio, interval.low, interval.high) == pytest.approx((2.0, 2.0, 2.0))
    assert [(each.contestant, each.load, each.memory) for each in costs(result)] == [
        ("quick", 0.5, 10**8),
        ("slow", 0.5, 10**8),
    ]


def test_the_roofline(result: Result) -> None:
    """10^9 operations over 10^8 bytes are 10 a byte; at 10^9 bytes a second that is 10^10, the peak too."""
    quick, slow = points(result)
    assert (quick.component, quick.intensity, quick.limit) == ("denoiser", 10.0, 1e10)
    assert quick.seconds == pytest.approx(2.0)
    assert quick.share == pytest.approx(0.5e9 / 1e10)
    assert slow.rate == pytest.approx(quick.rate / 2)
    result["rates"][0]["bandwidth"] = 1e8
    assert points(result)[0].limit == pytest.approx(1e9)


def test_onnx_runtime_computes_fp16_graphs_in_fp32_on_a_cpu(result: Result) -> None:
    for each in (result["contestants"]["quick"], result["rates"][0]):
        each["precision"] = "fp16"
    (quick,) = (each for each in points(result) if each.contestant == "quick")
    assert quick.intensity == 10.0, "four bytes a number"
    for each in (result["contestants"]["quick"], result["rates"][0]):
        each["backend"] = "openvino"
    (quick,) = (each for each in points(result) if each.contestant == "quick")
    assert quick.intensity == 20.0


def test_loading_and_warming_up(result: Result, tmp_path: Path) -> None:
    (*_, slow) = costs(result)
    assert slow.warm_up is None, "a result of before knows none"
    for number, turn in enumerate(result["contestants"]["slow"]["turns"]):
        turn["warm_up"] = [2.0 + number, 10.0]
    assert [each.warm_up for each in costs(result)] == [None, 13.0]
    text = write_report(result, tmp_path)[0].read_text(encoding="utf-8")
    assert "| quick | 0.50 | – | 100.0 MB | – |" in text
    assert "| slow | 0.50 | 13.00 | 100.0 MB | – |" in text
    assert "in each of 2 shapes, together" in text


def test_every_one_of_ours_is_held_against_every_peer(result: Result, tmp_path: Path) -> None:
    ours, peer = result["contestants"]["quick"], result["contestants"].pop("slow")
    result["contestants"] |= {"quick-fixed": copy.deepcopy(ours), "peer": {**peer, "bundle": None}}
    text = write_report(result, tmp_path)[0].read_text(encoding="utf-8")
    heads = re.findall(r"latency over (\S+) ", text)
    assert heads == ["quick", "quick-fixed"]
    first, second = text.split("latency over quick-fixed ")
    assert "| quick-fixed | 8 steps, batch 1, 64x64 | 1.00" in first
    assert "| peer | 8 steps, batch 1, 64x64 | 2.00" in first
    assert "| peer | 8 steps, batch 1, 64x64 | 2.00" in second
    assert "| quick | 8 steps, batch 1, 64x64 | 1.00" not in second


def test_what_seems_wrong_stands_first(result: Result, tmp_path: Path) -> None:
    result["notes"] = ["it is not the checkpoint"]
    result["contestants"]["slow"]["versions"] = {"python": "3.11", "torch": "2.8"}
    text = write_report(result, tmp_path)[0].read_text(encoding="utf-8")
    assert text.index("> **Note:** it is not the checkpoint.") < text.index("| contestant |")
    assert "slow ran beside python 3.11, torch 2.8." in text


def test_likeness_in_every_configuration(result: Result, tmp_path: Path) -> None:
    shape = {"batch": 1, "width": 64, "height": 64}
    found = [
        {**shape, "steps": steps, "psnr": psnr, "ssim": {}, "other": []}
        for steps, psnr in ((1, {"slow": 50.0}), (8, {"slow": 41.5, "late": 30.0}))
    ]
    result["quality"] = {**found[1], "reference": "quick", "configurations": found}
    text = write_report(result, tmp_path)[0].read_text(encoding="utf-8")
    assert "PSNR to quick in all configurations" in text
    assert "| 1 step, batch 1, 64x64 | 50.0 dB | – |" in text
    assert "| 8 steps, batch 1, 64x64 | 41.5 dB | 30.0 dB |" in text


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/result.json")), ids=lambda path: path.parent.name)
def test_committed_results_are_still_read_and_shown(path: Path, tmp_path: Path) -> None:
    found = read(path)
    text = write_report(found, tmp_path)[0].read_text(encoding="utf-8")
    assert all(f"| {name} |" in text for name, each in found["contestants"].items() if each["turns"])
    assert missing(found, found) == ([], [])


@pytest.fixture
def full(result: Result) -> Result:
    """With something for every plot."""
    for each in result["contestants"].values():
        for turn in each["turns"]:
            entries = [{**entry, "batch": 4} for entry in turn["pictures"]]
            turn["pictures"] += entries
    work = {"batch": 1, "width": 64, "height": 64, "steps": 8}
    result["quality"] = {**work, "reference": "quick", "psnr": {"slow": 41.5}}
    result["cold"] = [
        {
            "contestant": "quick",
            "kind": "engines cached",
            "steps": 4,
            "seconds": [1.0, 1.2],
            "memory": [1, 2],
        },
        {"contestant": "slow", "kind": "", "steps": 4, "error": "out of paint"},
    ]
    timing = {"throughput": 2.0, "mean": 0.5, "p50": 0.4, "p90": 0.6, "p99": 0.7, "queries": 10}
    result["scenarios"] = [
        {
            "contestant": "quick",
            **work,
            "scenario": "server",
            "generator": name,
            **timing,
            "rate": 1.9,
            "bound": 2.0,
        }
        for name in ("own", "loadgen")
    ] + [
        {
            "contestant": "slow",
            **work,
            "scenario": "server",
            "generator": "own",
            "error": "no rate",
            "bound": 2.0,
        }
    ]
    result["absent"] = {"diffusers": "give --checkpoint DIR"}
    return result


def test_every_plot_is_small_and_always_the_same(full: Result, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        drawn = plot_all(full, tmp_path / name)
        full["date"] = "another"
    assert [name for name, _ in drawn] == ["latency", "throughput", "stages", "roofline", "quality"]
    files = sorted((tmp_path / "one").iterdir())
    assert len(files) == 2 * len(drawn)
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert text == (tmp_path / "two" / file.name).read_text(encoding="utf-8")
        assert len(text) < 60_000
        xml.etree.ElementTree.fromstring(text)
        assert "slow" in text
        assert str(Path.home()) not in text
        assert str(tmp_path) not in text
    light, dark = ((tmp_path / "one" / name).read_text() for name in ("latency.svg", "latency-dark.svg"))
    assert light != dark
    assert plots.DARK.text in dark
    assert plots.DARK.text not in light


def test_many_contestants_all_look_different(result: Result) -> None:
    (contestant, *_) = result["contestants"].values()
    result["contestants"] = {str(number): contestant for number in range(20)}
    looks = looks_of(result)
    assert len({(look.colour, look.mark) for look in looks.values()}) == 20
    assert len({(look.colour, look.line) for look in looks.values()}) == 20


def test_a_result_of_nothing_has_no_plots(result: Result, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result["contestants"] = {}
    assert plot_all(result, tmp_path) == []
    path, _ = write_report(result, tmp_path)
    assert path.read_text().startswith("# Benchmark of tiny\n")


def test_the_report_tells_everything(full: Result, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, missing = write_report(full, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert missing == ""
    assert "Incomplete" not in text
    for part in (
        "| slow | 8 | 1 | 64x64 | 34 |",
        "| slow | 8 steps, batch 1, 64x64 | 2.00 (2.00 – 2.00) |",
        "| quick | batch 1, 64x64 | 1 | 2 |",
        "| slow | – | out of paint |",
        "| quick | server | loadgen |",
        "| quick | server | 1.00 | 1.00 | 1.00 | 1.00 |",
        "| slow | 41.5 dB |",
        "- diffusers: give --checkpoint DIR",
        "    allaprima bench",
    ):
        assert part in text
    shown = re.findall(r'(?:srcset|src)="(.+?)"', text)
    assert len(shown) == 10
    assert all((tmp_path / name).is_file() for name in shown)


def test_a_report_of_an_interrupted_run_says_so(result: Result, tmp_path: Path) -> None:
    result["complete"], result["stopped"] = False, "it was interrupted"
    assert "**Incomplete.** The run did not reach its end: it was interrupted." in write_report(
        result, tmp_path
    )[0].read_text(encoding="utf-8")
    del result["contestants"]["quick"]["turns"][1:]
    shorter = copy.deepcopy(result)
    shorter["stopped"] = None
    text = write_report(shorter, tmp_path)[0].read_text(encoding="utf-8")
    assert "it was killed" in text
    assert "2.00 (one round)" in text


def test_without_matplotlib_the_report_says_what_to_install(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    path, missing = write_report(result, tmp_path)
    assert "pip install 'allaprima[bench]'" in missing
    assert missing in path.read_text(encoding="utf-8")
    assert list(tmp_path.glob("*.svg")) == []
