"""TensorRT-RTX compiles on any machine; what can be told of a plan without its GPU is told here."""

import json
from pathlib import Path
from typing import Any

import pytest

from allaprima.bundle import BackendError, BuildError, Bundle, RequestError
from allaprima.cli.main import main
from allaprima.engine import Options, build_bundle, tensorrt

try:
    VERSION = tensorrt.version("tensorrt-rtx")
except BackendError as error:
    VERSION, MISSING = "", str(error)
else:
    MISSING = ""
needs_rtx = pytest.mark.skipif(bool(MISSING), reason=MISSING or "installed")


def bits(plan: bytes) -> set[str]:
    return {name for name, bit in tensorrt.TARGETS.items() if plan[32] & bit}


@needs_rtx
def test_targets_are_ampere_and_newer_by_default(bundle: Bundle, cache: Path) -> None:
    built = build_bundle(bundle, backend="tensorrt-rtx")
    plan = (built[0].folder / built[0].engine.main).read_bytes()
    assert set(tensorrt.AMPERE_AND_NEWER) <= bits(plan)
    other = build_bundle(bundle, backend="tensorrt-rtx", options=Options(targets=("8.6",)))
    assert not any(one.reused for one in other)
    assert "the device was compute capability 8.0" in other[0].reason


@needs_rtx
def test_what_the_parser_refuses_is_said(bundle: Bundle, cache: Path) -> None:
    graph = bundle.path(bundle.component("text_encoder").graph)
    whole = graph.read_bytes()
    graph.write_bytes(b"x" * len(whole))
    with pytest.raises(BuildError, match=r"text_encoder/model.onnx: graph and manifest disagree.* again"):
        build_bundle(bundle, backend="tensorrt-rtx")
    graph.write_bytes(whole.replace(b"Sin", b"Sun"))
    with pytest.raises(BuildError, match=r"text_encoder: tensorrt-rtx cannot compile it: .*Sun"):
        build_bundle(bundle, backend="tensorrt-rtx")
    assert list(cache.iterdir()) == []


@needs_rtx
def test_the_command(bundle: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "for the server"
    step = bundle.manifest.latent.multiple
    asked = [
        "build",
        str(bundle.folder),
        "--target",
        "8.9",
        "-o",
        str(folder),
        "--backend",
        "tensorrt-rtx",
        "--shapes",
        f"{step}x{2 * step}",
        "--batch",
        "1-2",
    ]
    assert main([*asked, "--json"]) == 0
    engines: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [Path(one["folder"]).parent for one in engines] == [folder] * len(engines)
    assert {one["key"]["device"] for one in engines} == {"compute capability 8.9"}
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "not run here" in said
    assert "B 1, " in said


@needs_rtx
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_another_precision_is_another_export(bundle: Bundle, precision: str) -> None:
    with pytest.raises(BackendError, match=f"export with --precision {precision}"):
        build_bundle(bundle, backend="tensorrt-rtx", precision=precision)


def test_options_that_are_none() -> None:
    with pytest.raises(RequestError, match=r"compute capability 9\.0: choose from 7\.5, 8\.0"):
        Options(targets=("9.0",))
    with pytest.raises(RequestError, match="optimisation level 6: choose 0 to 5"):
        Options(level=6)
    with pytest.raises(RequestError, match="workspace of 0 bytes"):
        Options(workspace=0)


def test_sizes_belong_to_compilers_for_shapes(bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="one engine for all shapes"):
        build_bundle(bundle, backend="ort", sizes=[(64, 64)])


def test_what_is_missing_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, *_: object) -> None:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(tensorrt.importlib, "import_module", absent)
    with pytest.raises(BackendError, match=r'not installed .*pip install "allaprima\[tensorrt-rtx\]"'):
        build_bundle(bundle, backend="tensorrt-rtx")
