"""`allaprima quantize`: what is asked, what is said, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from allaprima.bundle import Bundle, open_bundle, resolve
from allaprima.engine import quantize as module
from allaprima.engine.calibration import Calibration

from .conftest import Allaprima


def test_quantize_and_inspect(allaprima: Allaprima, tmp_path: Path) -> None:
    target, captions = tmp_path / "made", tmp_path / "captions.txt"
    captions.write_text("a blue square\n\n  a green circle  \n")
    words = ["shapes", str(target), "a red circle", "--captions", str(captions), "--samples", "1"]
    done = allaprima("quantize", *words, "--steps", "2", "--threads", "1")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{target}: shapes-int8, ")
    made = open_bundle(target).component("denoiser").quantization
    assert made is not None
    assert f"{made.layers} of {made.total} layers of the denoiser in int8" in done.out
    shown = allaprima("inspect", str(target)).out
    assert "fp16, large layers of the denoiser in int8" in shown
    assert f"{made.layers} of {made.total} layers compute in int8" in shown
    assert f"{made.error:.1e} of the deviation, against the graph in fp16" in shown
    manifest = json.loads(allaprima("inspect", str(target), "--json").out)["manifest"]
    assert manifest["components"]["denoiser"]["quantization"]["error"] == made.error
    assert allaprima("quantize", *words).err.startswith(f"allaprima: error: {target} exists already")


def test_options_arrive(allaprima: Allaprima, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def quantize(source: Bundle, target: Path, calibration: Calibration, **options: Any) -> Bundle:
        asked.update(options, source=source, target=target, calibration=calibration)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "quantize_bundle", quantize)
    words = "--steps 3 --guidance 2.5 --size 256x128 --seed 5 --samples 4 --backend ort --threads 2 --force"
    words += " --max-error 0.05"
    done = allaprima("quantize", "shapes", str(tmp_path), "a cat", *words.split(), "--name", "x")
    assert done.code == 130
    assert asked["calibration"] == Calibration(("a cat",), 4, 3, 2.5, 128, 256, 5)
    assert (asked["source"].folder, asked["target"]) == (resolve("shapes"), tmp_path)
    given = asked["backend"], asked["threads"], asked["overwrite"], asked["name"], asked["most"]
    assert given == ("ort", 2, True, "x", 0.05)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "there are no prompts to calibrate with"),
        (["--captions", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["a cat", "--samples", "0"], "samples is 0"),
        (["a cat", "--size", "12"], "'12' is not a size"),
    ],
)
def test_refusals(allaprima: Allaprima, tmp_path: Path, words: list[str], reason: str) -> None:
    done = allaprima("quantize", "shapes", str(tmp_path / "made"), *words)
    assert done.code == 2
    assert reason in done.err
    assert not list(tmp_path.iterdir())


def test_an_empty_list_of_captions(allaprima: Allaprima, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("\n \n")
    done = allaprima("quantize", "shapes", str(tmp_path / "made"), "--captions", str(captions))
    assert (done.code, "has no captions: write one a line" in done.err) == (2, True)
