"""`allaprima export`: how words become an export. The export itself is a stand-in here."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

from allaprima.bundle import Bundle, open_bundle


class SingleFile(NamedTuple):
    """Of allaprima.export."""

    tokenizer: str | None
    prediction: str | None
    allow_pickle: bool


class Usage(NamedTuple):
    """Of allaprima.export."""

    preset: str | None
    steps: int | None
    guidance_scale: float | None


Allaprima = Callable[..., SimpleNamespace]
WriteBundle = Callable[..., Path]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, write_bundle: WriteBundle) -> dict[str, Any]:
    """What the stand-in for allaprima.export was asked for; it writes the small bundle."""
    asked: dict[str, Any] = {}

    def export_checkpoint(
        source: str, target: Path, *, progress: Callable[[Any], None], **options: Any
    ) -> Bundle:
        asked.update(options, source=source, target=target)
        progress(SimpleNamespace(stage="denoiser: trace", done=1, total=12))
        return open_bundle(write_bundle(target, overwrite=options["overwrite"]))

    module = ModuleType("allaprima.export")
    module.__dict__["export_checkpoint"] = export_checkpoint
    module.__dict__["SingleFile"] = SingleFile
    module.__dict__["Usage"] = Usage
    monkeypatch.setitem(sys.modules, "allaprima.export", module)
    return asked


def test_export(allaprima: Allaprima, asked: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "out"
    outcome = allaprima("export", "models/x", str(target))
    assert asked == {
        "source": "models/x",
        "target": target,
        "precision": "fp16",
        "name": None,
        "overwrite": False,
        "single": SingleFile(None, None, False),
        "thresholding": False,
        "usage": Usage(None, None, None),
        "prior": None,
        "image_encoder": False,
        "text_encoder_weights": None,
        "step_cache": 0,
    }
    assert outcome.out == f"{target}: tiny, fp16, 7.0 kB in 3 files\n"
    refused = allaprima("export", "models/x", str(target))
    assert refused.code == 2
    assert "exists already" in refused.err


def test_every_option(allaprima: Allaprima, asked: dict[str, Any], tmp_path: Path) -> None:
    words = ("--precision", "bf16", "--name", "red", "--force", "--quiet", "--allow-pickle")
    words += ("--thresholding", "--tokenizer", "clip", "--prediction", "v_prediction")
    words += ("--preset", "lcm", "--steps", "6", "--guidance", "1.5", "--prior", "p", "--image-encoder")
    outcome = allaprima("export", "hub/id", str(tmp_path / "out"), *words)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert (asked["precision"], asked["name"], asked["overwrite"]) == ("bf16", "red", True)
    assert asked["single"] == SingleFile("clip", "v_prediction", True)
    assert asked["thresholding"] is True
    assert (asked["prior"], asked["image_encoder"]) == ("p", True)
    assert asked["usage"] == Usage("lcm", 6, 1.5)


@pytest.mark.parametrize(
    ("words", "layers"), [(["--step-cache"], 1), (["--step-cache-layers", "2"], 2)], ids=["usual", "more"]
)
def test_step_cache(
    allaprima: Allaprima, asked: dict[str, Any], tmp_path: Path, words: list[str], layers: int
) -> None:
    assert allaprima("export", *words, "models/x", str(tmp_path / "out")).code == 0
    assert asked["step_cache"] == layers


def test_precision_is_one_of_three(allaprima: Allaprima, asked: dict[str, Any]) -> None:
    outcome = allaprima("export", "a", "b", "--precision", "int8")
    assert outcome.code == 2
    assert "invalid choice: 'int8'" in outcome.err


def test_without_torch() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom allaprima.cli.main import main\n"
        "sys.exit(main(['export', 'a', 'b']))"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith(
        "allaprima: error: export needs torch, which is not installed: pip install"
    )
