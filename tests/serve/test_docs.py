"""What docs/server.md shows is run as it stands, against a server on another port."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from .conftest import Running, until

PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) for kind in ("python", "sh")}
ADDRESS = "http://127.0.0.1:8000"


def test_python(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    server.studio.seconds = 0.02
    (block,) = BLOCKS["python"]
    assert ADDRESS in block
    exec(compile(block.replace(ADDRESS, server.url), "server.md", "exec"), {})
    assert {path.name for path in tmp_path.iterdir()} == {
        "picture.png",
        "image_generation.partial_image.png",
        "image_generation.completed.png",
    }
    assert server.studio.asked[-1].request.strength == 0.6


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(server: Running, tmp_path: Path) -> None:
    server.studio.hold()
    (block,) = (each for each in BLOCKS["sh"] if "curl" in each)
    words = ["sh", "-e", "-c", block.replace(ADDRESS, server.url)]
    said = tmp_path / "said"
    with (
        said.open("wb") as output,
        subprocess.Popen(words, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        try:
            until(lambda: "event: status" in said.read_text() or process.poll() is not None, 60)
            server.studio.go()  # not before somebody listens
            assert process.wait(60) == 0, said.read_text()
        finally:
            process.kill()
    assert "event: preview" in said.read_text()
    assert "event: ended" in said.read_text()
    with Image.open(tmp_path / "circle.png") as image:
        assert image.size == (128, 128)
    assert server.studio.asked[-1].request.image.size == (128, 128)
