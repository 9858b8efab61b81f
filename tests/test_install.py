"""The runtime alone, installed from a wheel into an environment of its own, paints a picture."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
ABSENT = ("torch", "diffusers", "transformers", "onnx")

PAINT = """
import sys
from allaprima.cli.main import main
code = main(["generate", "a red circle", "--steps", "4", "--seed", "7", "--backend", "ort"])
loaded = sorted({name.partition(".")[0] for name in sys.modules})
print(*loaded)
sys.exit(code)
"""

LIST_PAGE = """
from importlib.resources import files
print(*(each.name for each in files("allaprima.serve").joinpath("page").iterdir()))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with `allaprima[ort]`, built from this source, and no more."""
    folder = tmp_path_factory.mktemp("lean")
    venv.create(folder, with_pip=True)
    interpreter = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    install = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "--constraint", ROOT / "constraints.txt", f"{ROOT}[ort]"], check=True)
    return interpreter


def test_paints_without_torch(python: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    painted = subprocess.run(
        [python, "-c", PAINT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert painted.returncode == 0, painted.stderr
    assert not set(painted.stdout.splitlines()[-1].split()) & set(ABSENT)
    assert Image.open(tmp_path / "picture.png").size == (128, 128)
    for name in ABSENT:
        missing = subprocess.run(
            [python, "-c", f"import {name}"], env=environment, capture_output=True, check=False
        )
        assert b"ModuleNotFoundError" in missing.stderr, (
            f"{name} is installed: this environment proves nothing"
        )


def test_the_page_of_the_server_comes_along(python: Path, tmp_path: Path) -> None:
    listed = subprocess.run(
        [python, "-c", LIST_PAGE], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    there = {path.name for path in (ROOT / "serve" / "page").iterdir()}
    assert set(listed.stdout.split()) == there


def test_export_names_its_extra(python: Path, tmp_path: Path) -> None:
    refused = subprocess.run(
        [python, "-m", "allaprima.cli", "export", tmp_path, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert 'pip install "allaprima[export]"' in refused.stderr
