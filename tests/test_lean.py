"""The process that paints needs none of the libraries that export needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

# Refuses the libraries, and remembers who asked: an import inside `try` would go unnoticed otherwise.
CODE = """
import json, sys
banned, asked = {"torch", "diffusers", "transformers", "onnx"}, []

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in banned:
            asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
from allaprima.cli.main import main
code = main(["generate", "a red circle", "--seed", "7", "--steps", "2", "--quiet", *sys.argv[1:]])
print(json.dumps({"code": code, "asked": asked, "loaded": sorted(banned & set(sys.modules))}))
"""


@pytest.mark.parametrize("backend", ["openvino", "ort"])
def test_painting_is_lean(tmp_path: Path, backend: str) -> None:
    picture = tmp_path / "picture.png"
    command = [sys.executable, "-c", CODE, "--backend", backend, "-o", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == ""
    assert json.loads(done.stdout) == {"code": 0, "asked": [], "loaded": []}
    with Image.open(picture) as image:
        assert image.size == (128, 128)
