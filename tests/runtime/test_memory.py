"""What is let go of goes back to the system."""

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

SIDE, LAYERS = 1024, 12
WEIGHTS = SIDE * SIDE * LAYERS * 4

SCRIPT = """
import gc, sys
from pathlib import Path
import numpy as np
from allaprima.bundle import Component, TensorSpec
from allaprima.runtime import open_session
from allaprima.runtime.memory import on_host, trim

def own():
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index("RssAnon:") + 1]) * 1024

specs = (TensorSpec("x", "float32", ("B", 1024)),), (TensorSpec("y", "float32", ("B", 1024)),)
component = Component("model.onnx", "fp32", *specs, ())
path, backend = Path(sys.argv[1]), sys.argv[2]
session = open_session(path, component, backend, precision="fp32", threads=1, memory_limit=10**9)
before = own()
for _ in range(3):
    arrays = {"x": np.ones((2, 1024), np.float32), "y": np.zeros((2, 1024), np.float32)}
    binding = session.bind(on_host(arrays))
    binding.run()
    loaded = own()
    del binding
    session.unload()
    gc.collect()
    trim()
    print(loaded - before, own() - before)
"""


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Matrix products with weights of 4 MB each, which glibc would rather keep."""
    nodes, names = [], ["x", *(f"h{index}" for index in range(1, LAYERS)), "y"]
    weights = np.eye(SIDE, dtype=np.float32)
    for index in range(LAYERS):
        nodes.append(helper.make_node("MatMul", [names[index], f"w{index}"], [names[index + 1]]))
    values = [numpy_helper.from_array(weights * (1 + index), f"w{index}") for index in range(LAYERS)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", SIDE]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "stack", ends[:1], ends[1:], values),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.data")
    return path


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="another C library frees otherwise"
)
@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_weights_that_were_unloaded_are_given_back(graph: Path, backend: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(graph), backend], capture_output=True, text=True, check=True
    )
    rounds = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(rounds) == 3
    for loaded, left in rounds:
        assert loaded > 0.8 * WEIGHTS
        assert left < 0.4 * WEIGHTS
