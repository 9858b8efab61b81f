"""Who may import whom: the table of the house, enforced on the source text.

A layer may import the layers listed for it, the standard library and its own third-party packages. A driver
package is imported in the files that own it and inside a function, so that its absence is an error that
somebody can word.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Layer:
    """What a layer may import. `packages` None is anything."""

    layers: tuple[str, ...]
    packages: tuple[str, ...] | None


EXPORT = (
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
)
ALL = ("bundle", "export", "engine", "runtime", "serve", "cli", "benchmarks", "models")
LAYERS = {
    "bundle": Layer((), ()),
    "export": Layer(("bundle",), (*EXPORT, "tokenizers", "torch", "transformers")),
    "engine": Layer(("bundle", "runtime"), ("filelock", "numpy", "onnx")),
    "runtime": Layer(("bundle",), ("numpy", "PIL", "tokenizers")),
    "serve": Layer(
        ("bundle", "runtime"),
        (
            "anyio",
            "fastapi",
            "h11",
            "numpy",
            "PIL",
            "prometheus_client",
            "pydantic",
            "python_multipart",
            "ray",
            "starlette",
            "uvicorn",
        ),
    ),
    "cli": Layer(ALL, ("rich",)),
    "benchmarks": Layer(ALL, None),
    "models": Layer(ALL, None),
}
DRIVERS: dict[str, tuple[str, ...]] = {
    "cuda": ("runtime/cuda.py", "runtime/exchange.py"),
    # Export may not import the runtime, so its check against torch opens graphs itself.
    "onnxruntime": ("runtime/sessions/ort.py", "runtime/sessions/ort_cuda.py", "export/segments.py"),
    "openvino": ("runtime/sessions/openvino.py", "runtime/sessions/openvino_weights.py"),
    "polygraphy": ("engine/tensorrt.py",),
    "tensorrt": (),
    "tensorrt_rtx": (),
}
"""Each driver package with the files that own it."""


@dataclass(frozen=True)
class Import:
    """One import: the dotted name, the line, and whether it runs only when a function does (or never)."""

    name: str
    line: int
    late: bool


def find_imports(node: ast.AST, *, late: bool = False) -> Iterator[Import]:
    """All imports below a node. What stands under `if TYPE_CHECKING` never runs, which is late enough."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            names = (
                [f"allaprima.{alias.name}" for alias in child.names] if module == "allaprima" else [module]
            )
            yield from (Import(name, child.lineno, late) for name in names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from find_imports(ast.Module(child.body, []), late=True)
            yield from find_imports(ast.Module(child.orelse, []), late=late)
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from find_imports(child, late=late or inside)


def violations(path: str, source: str) -> list[str]:
    """What the file `path` (from the root, with /) imports and should not."""
    home = path.partition("/")[0]
    return [
        f"{path}:{found.line}: {found.name}: {why}"
        for found in find_imports(ast.parse(source))
        if (why := judge(path, home, found))
    ]


def judge(path: str, home: str, found: Import) -> str:
    """Why an import is wrong; empty if it is not."""
    top, _, rest = found.name.partition(".")
    if not top:  # tests are not installed, so their shared pieces have no other name
        return "" if home == "tests" else "relative imports are banned"
    if top in ALL:
        return f"the bare form would be a second module: import allaprima.{found.name}"
    layer = LAYERS.get(home)
    if layer is None or top in sys.stdlib_module_names:
        return ""
    if top == "allaprima":
        other = rest.partition(".")[0]
        if other != home and other not in layer.layers:
            return f"{home} may not import {other or 'the namespace itself'}"
        return (
            "" if home != "cli" or found.late or other in ("bundle", "cli") else "import it inside a function"
        )
    if top in DRIVERS and layer.packages is not None:
        owners = DRIVERS[top]
        if path not in owners:
            return f"only {', '.join(owners) or 'no file so far'} may import it"
        return "" if found.late else "import it inside a function"
    if layer.packages is not None and top not in layer.packages:
        return f"{home} may not import it"
    return "" if home != "cli" or found.late else "import it inside a function"


def sources() -> list[Path]:
    """Every Python file of the layers and the tests."""
    return [path for folder in (*LAYERS, "tests") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_there_is_something_to_walk() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in sources()}
    assert {"bundle/store.py", "cli/main.py", "tests/test_layering.py"} <= names


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports(path: Path) -> None:
    assert violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "why"),
    [
        ("bundle/a.py", "import numpy", "bundle may not import it"),
        ("bundle/a.py", "from allaprima.runtime import Pipeline", "bundle may not import runtime"),
        ("bundle/a.py", "def f():\n    import allaprima.export", "bundle may not import export"),
        ("bundle/a.py", "from allaprima import runtime", "bundle may not import runtime"),
        ("runtime/a.py", "import torch", "runtime may not import it"),
        (
            "runtime/a.py",
            "def f():\n    import onnxruntime",
            "only runtime/sessions/ort.py, runtime/sessions/ort_cuda.py, export/segments.py may import it",
        ),
        ("runtime/a.py", "def f():\n    import tensorrt", "no file so far may import it"),
        ("runtime/sessions/ort.py", "import onnxruntime as ort", "inside a function"),
        (
            "runtime/sessions/ort.py",
            "try:\n    import onnxruntime\nexcept ImportError: ...",
            "inside a function",
        ),
        ("runtime/a.py", "from allaprima.engine import cache", "runtime may not import engine"),
        ("engine/a.py", "import allaprima.export.step", "engine may not import export"),
        ("export/a.py", "from allaprima.runtime import samplers", "export may not import runtime"),
        ("cli/a.py", "from allaprima.runtime import Pipeline", "inside a function"),
        ("cli/a.py", "from rich.table import Table", "inside a function"),
        ("cli/a.py", "import numpy", "cli may not import it"),
        ("serve/a.py", "from allaprima.engine import Engine", "serve may not import engine"),
        ("serve/a.py", "import torch", "serve may not import it"),
        ("runtime/a.py", "from allaprima.serve import app", "runtime may not import serve"),
        ("export/a.py", "import runtime", "import allaprima.runtime"),
        ("tests/a.py", "from bundle.errors import BundleError", "import allaprima.bundle.errors"),
        ("cli/a.py", "from . import main", "relative imports are banned"),
        ("models/shapes/a.py", "from .scenes import draw", "relative imports are banned"),
        ("runtime/a.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch", "runtime may not import it"),
    ],
)
def test_a_planted_violation_is_found(path: str, source: str, why: str) -> None:
    found = violations(path, source)
    assert len(found) == 1
    assert why in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("bundle/a.py", "import json, os.path\nfrom allaprima.bundle.errors import BundleError"),
        ("runtime/sessions/ort.py", "def f():\n    import onnxruntime as ort"),
        ("runtime/sessions/ort.py", "if TYPE_CHECKING:\n    import onnxruntime"),
        (
            "cli/a.py",
            "from allaprima.bundle import VERSION\ndef f():\n    from allaprima.runtime import Pipeline",
        ),
        (
            "cli/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from allaprima.runtime import Result",
        ),
        ("benchmarks/a.py", "import torch, onnxruntime, openvino"),
        ("tests/a.py", "import torch\nfrom allaprima.export import export_checkpoint"),
    ],
)
def test_what_is_allowed(path: str, source: str) -> None:
    assert violations(path, source) == []
