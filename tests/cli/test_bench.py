"""allaprima bench, from the command to the report."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Allaprima = Callable[..., Any]
TINY = ("--sizes", "64x64", "--backend", "ort", "--threads", "1", "--rounds", "2", "--repeats", "1")


def test_the_whole_command(allaprima: Allaprima, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    outcome = allaprima(
        *("bench", "shapes", "--steps", "1,2", *TINY, "--cold", "1", "--vs", "diffusers"),
        *("--checkpoint", str(tmp_path), "-o", str(folder)),
    )
    assert outcome.code == 0, outcome.err
    assert "allaprima-ort-fp32" in outcome.out
    assert "diffusers was not measured" in outcome.err
    result = json.loads((folder / "result.json").read_text())
    assert (result["schema"], result["complete"], result["model"]) == (2, True, "shapes")
    contestant = result["contestants"]["allaprima-ort-fp32"]
    assert [turn["round"] for turn in contestant["turns"]] == [0, 1]
    for turn in contestant["turns"]:
        assert turn["load"] > 0
        for entry in turn["pictures"]:
            assert list(entry["stages"]) == ["text", "denoise", "decode"]
            assert entry["engine"]["denoiser"]["calls"] == entry["steps"]
            assert sum(each["seconds"][0] for each in entry["engine"].values()) < entry["seconds"][0]
    assert [each["kind"] for each in result["cold"]] == ["no engines", "engines cached"]
    assert all(len(each["seconds"]) == 1 for each in result["cold"])
    assert [each["round"] for each in result["rates"]] == [0, 1]
    assert {each["component"] for each in result["counts"]} >= {"denoiser", "vae_decoder", "text_encoder"}
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "## Distance from the machine's limit" in report
    assert "| allaprima-ort-fp32 | denoiser |" in report
    assert str(tmp_path) not in json.dumps(result["contestants"])

    same = allaprima("bench", "compare", str(folder), str(folder / "result.json"))
    assert same.code == 0
    assert "no difference" in same.out


@pytest.fixture
def results(tmp_path: Path) -> Callable[..., Path]:
    """results(name, factor): a result on disk whose only contestant takes `factor` seconds."""
    from allaprima.benchmarks.plan import Plan, Settings, Work
    from allaprima.benchmarks.result import new_result, write

    def make(name: str, factor: float, contestant: str = "a") -> Path:
        work = Work(1, 64, 64, 4)
        plan = Plan((work,), Settings("a cat", None, 1, 2.0, 1), 3, 1)
        result = new_result("allaprima bench", "tiny", plan)
        turns = [
            {"round": number, "complete": True, "load": 1.0, "memory": 1, "device_memory": None}
            | {
                "pictures": [
                    {**vars(work), "seconds": [factor * mood], "png": [0.1], "stages": {}, "engine": None}
                ]
            }
            for number, mood in enumerate((0.99, 1.0, 1.01))
        ]
        result["contestants"][contestant] = {
            "precision": "fp32",
            "backend": None,
            "bundle": None,
            "turns": turns,
        }
        result["complete"] = True
        return write(tmp_path / name, result)

    return make


def test_the_exit_code_of_compare(allaprima: Allaprima, results: Callable[..., Path]) -> None:
    first, same, slower = results("first", 1.0), results("same", 1.001), results("slower", 1.5)
    assert allaprima("bench", "compare", str(first), str(same)).code == 0
    assert allaprima("bench", "compare", str(slower), str(first)).code == 0
    worse = allaprima("bench", "compare", str(first), str(slower))
    assert worse.code == 1
    assert "slower" in worse.out
    assert allaprima("bench", "compare", str(first), str(slower), "--tolerance", "0.7").code == 0
    told = json.loads(allaprima("bench", "compare", str(first), str(slower), "--json").out)
    assert [each["verdict"] for each in told["verdicts"]] == ["slower", "slower"]
    assert told["verdicts"][0]["configuration"]["steps"] == 4
    quiet = allaprima("bench", "compare", str(first), str(slower), "--quiet")
    assert (quiet.code, quiet.out) == (1, "")


def test_what_the_second_result_lacks_counts_as_worse(
    allaprima: Allaprima, results: Callable[..., Path]
) -> None:
    from allaprima.benchmarks.result import read, write

    whole = read(results("whole", 1.0))
    whole["contestants"]["b"] = whole["contestants"]["a"]
    first = write(results("first", 1.0).parent, whole)
    second = results("second", 1.0)
    result = read(second)
    result["absent"]["b"] = "RuntimeError: it crashed"
    write(second.parent, result)
    outcome = allaprima("bench", "compare", str(first), str(second))
    assert outcome.code == 1
    assert "the second result lacks b at 4 steps, batch 1, 64x64: RuntimeError: it crashed" in outcome.err
    assert "slower" not in outcome.out
    back = allaprima("bench", "compare", str(second), str(first))
    assert back.code == 0
    assert "the first result lacks b at 4 steps" in back.err
    told = json.loads(allaprima("bench", "compare", str(first), str(second), "--json").out)["missing"]
    assert (told["first"], [each["contestant"] for each in told["second"]]) == ([], ["b"])


def test_compare_against_a_contestant(allaprima: Allaprima, results: Callable[..., Path]) -> None:
    from allaprima.benchmarks.result import read, write

    paths = []
    for name, factor in (("first", 1.0), ("second", 1.5)):
        result = read(results(name, factor))
        result["contestants"]["peer"] = read(results(f"{name}-peer", 2 * factor))["contestants"]["a"]
        paths.append(str(write(results(name, factor).parent, result)))
    assert allaprima("bench", "compare", *paths).code == 1
    fair = allaprima("bench", "compare", *paths, "--against", "peer")
    assert fair.code == 0
    assert "latency over peer, ratio" in fair.out
    refused = allaprima("bench", "compare", *paths, "--against", "nobody")
    assert refused.code == 2
    assert "against is 'nobody'" in refused.err


@pytest.mark.parametrize(("error", "why"), [(MemoryError("no more"), "MemoryError: no more")])
def test_a_run_that_fails_is_kept_and_told(
    allaprima: Allaprima, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, why: str
) -> None:
    def fail(self: Any, measured: Any) -> None:
        raise error

    monkeypatch.setattr("allaprima.benchmarks.harness.Harness.run", fail)
    with pytest.raises(type(error)):
        allaprima("bench", "shapes", "--steps", "1", *TINY, "-o", str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["complete"], result["stopped"]) == (False, f"it failed: {why}")
    assert f"it failed: {why}" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_what_compare_refuses(allaprima: Allaprima, results: Callable[..., Path], tmp_path: Path) -> None:
    first, other = results("first", 1.0), results("other", 1.0, contestant="b")
    older = tmp_path / "older.json"
    older.write_text('{"schema": 1}')
    for words, why in (
        ((first, other), "no configuration in common"),
        ((first, older), "has the schema 1"),
        ((first, tmp_path / "nothing"), "cannot be read"),
        ((first,), "compare takes two results, not 1"),
    ):
        outcome = allaprima("bench", "compare", *map(str, words))
        assert outcome.code == 2
        assert why in outcome.err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--steps", "one"), "'one' is no list of numbers"),
        (("--steps", "0"), "steps is 0"),
        (("--sizes", "64"), "'64' is no size"),
        (("--vs", "torch"), "unknown peer 'torch'"),
        (("--vs", "a,,b"), "is no list"),
        (("--scenario", "server"), "give --latency SECONDS"),
        (("--scenario", "serve"), "unknown scenario 'serve'"),
        (("--cold", "-1"), "cold is -1"),
        (("--rounds", "0"), "0 rounds"),
        (("--threads", "0"), "threads is 0"),
    ],
)
def test_what_is_refused_before_anything_is_measured(
    allaprima: Allaprima, words: tuple[str, ...], why: str, tmp_path: Path
) -> None:
    outcome = allaprima("bench", "shapes", *words, "-o", str(tmp_path / "report"))
    assert outcome.code == 2
    assert why in outcome.err
    assert not (tmp_path / "report").exists()


def test_nobody_could_be_measured(allaprima: Allaprima, tmp_path: Path) -> None:
    outcome = allaprima(
        *("bench", "shapes", "--steps", "1", *TINY, "--precision", "bf16", "--cold", "0", "--no-roofline"),
        *("-o", str(tmp_path)),
    )
    assert outcome.code == 2
    assert "nothing could be measured: allaprima-ort-bf16: onnxruntime computes" in outcome.err


def test_a_scenario(allaprima: Allaprima, tmp_path: Path) -> None:
    outcome = allaprima(
        *("bench", "shapes", "--scenario", "server", "--latency", "600", "--queries", "2", "--steps", "1"),
        *(*TINY, "--no-loadgen", "--json", "-o", str(tmp_path)),
    )
    assert outcome.code == 0, outcome.err
    (found,) = json.loads(outcome.out)["scenarios"]
    assert (found["scenario"], found["queries"], found["bound"]) == ("server", 2, 600.0)
    assert "## Scenarios" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for another process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_kept_and_marked(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "allaprima.cli", "bench", "shapes", "--steps", "1", *TINY]
    command += ["--rounds", "500", "--no-roofline", "-o", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored if this one runs behind
    )
    path = tmp_path / "result.json"

    def turns() -> list[dict[str, Any]]:
        contestants = json.loads(path.read_text())["contestants"] if path.exists() else {}
        return [turn for each in contestants.values() for turn in each["turns"] if turn["pictures"]]

    try:
        while not turns() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "allaprima: interrupted" in said
    assert turns()
    result = json.loads(path.read_text())
    assert (result["complete"], result["stopped"]) == (False, "it was interrupted")
    assert "**Incomplete.**" in (tmp_path / "report.md").read_text(encoding="utf-8")
