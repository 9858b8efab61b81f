"""The process that paints needs none of the libraries that export needs."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

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
code = main(sys.argv[1:])
print(json.dumps({"code": code, "asked": asked, "loaded": sorted(banned & set(sys.modules))}))
"""


@pytest.mark.parametrize("backend", ["openvino", "ort"])
def test_painting_is_lean(tmp_path: Path, backend: str) -> None:
    picture = tmp_path / "picture.png"
    words = ["generate", "a red circle", "--seed", "7", "--steps", "2", "--quiet", "--backend", backend]
    command = [sys.executable, "-c", CODE, *words, "-o", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == ""
    assert json.loads(done.stdout) == {"code": 0, "asked": [], "loaded": []}
    with Image.open(picture) as image:
        assert image.size == (128, 128)


def test_serving_is_lean(tmp_path: Path) -> None:
    words = ["serve", "--port", "0", "--backend", "ort", "--lanes", "1"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CODE, *words], cwd=tmp_path, **pipes) as process:
        assert process.stderr is not None
        url = json.loads(process.stderr.readline())["url"]
        body = json.dumps({"prompt": "a red circle", "num_inference_steps": 2}).encode()
        request = urllib.request.Request(
            f"{url}/v1/images/generations", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert len(json.load(answer)["data"]) == 1
        process.terminate()
        out, _ = process.communicate(timeout=60)
    assert json.loads(out) == {"code": 0, "asked": [], "loaded": []}
