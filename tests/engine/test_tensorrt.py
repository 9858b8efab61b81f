"""What the two TensorRTs are asked to do, and what TensorRT-RTX does, which compiles on any machine."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from allaprima.bundle import BackendError, BuildError, Bundle, RequestError, matching_engines
from allaprima.cli.main import main
from allaprima.engine import Options, build, build_bundle, compilers, options, toolchains
from allaprima.engine.options import AMPERE_AND_NEWER, TARGETS
from allaprima.engine.timing import timing_name
from allaprima.runtime import flavours
from allaprima.runtime.backends import BackendInfo
from allaprima.runtime.cuda import Device, current_device
from allaprima.runtime.flavours import flavour_for
from allaprima.runtime.footprint import Footprint
from allaprima.runtime.sessions.tensorrt_driver import TENSORRT_RTX

try:
    VERSION = flavours.version("tensorrt-rtx")
except BackendError as error:
    VERSION, MISSING = "", str(error)
else:
    MISSING = ""
needs_rtx = pytest.mark.skipif(bool(MISSING), reason=MISSING or "installed")


def bits(plan: bytes) -> set[str]:
    return {name for name, bit in TARGETS.items() if plan[32] & bit}


def no_gpu() -> Device:
    raise BackendError("no NVIDIA GPU works here (no driver): install its driver")


@needs_rtx
def test_targets_are_ampere_and_newer_by_default(bundle: Bundle, cache: Path) -> None:
    built = build_bundle(bundle, backend="tensorrt-rtx")
    plan = (built[0].folder / built[0].engine.main).read_bytes()
    assert set(AMPERE_AND_NEWER) <= bits(plan)
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
    with pytest.raises(RequestError, match="prompts of 0 chunks: give at least 1"):
        Options(chunks=0)


@pytest.mark.parametrize(
    ("capability", "flavour"),
    [
        *((name, "tensorrt-rtx") for name in (*TARGETS, "8.7")),
        ("9.0", "tensorrt"),
        ("10.0", "tensorrt"),
        ("10.3", "tensorrt"),
        ("7.0", None),
        ("6.1", None),
    ],
)
def test_each_gpu_has_its_flavour(capability: str, flavour: str | None) -> None:
    assert flavour_for(capability) == flavour


@pytest.mark.parametrize(
    ("capability", "runs", "chosen"),
    [
        ("9.0", ["tensorrt", "tensorrt-rtx"], "tensorrt"),
        ("8.9", ["tensorrt", "tensorrt-rtx"], "tensorrt-rtx"),
        ("9.0", ["tensorrt-rtx"], "ort"),  # installed, but not for this GPU
        ("8.9", [], "ort"),
    ],
)
def test_auto_is_what_suits_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: str, runs: list[str], chosen: str
) -> None:
    monkeypatch.setattr(build, "current_device", lambda: Device("NVIDIA X", capability))
    monkeypatch.setattr(build, "backends", lambda: tuple(BackendInfo(name, True) for name in runs))
    monkeypatch.setattr(build, "choose", {"auto": "ort"}.get)
    assert build._resolve("auto") == chosen
    monkeypatch.setattr(build, "current_device", no_gpu)
    assert build._resolve("auto") == "ort"
    assert build._resolve("tensorrt") == "tensorrt"


class CoreDevice:
    """Of cuda.core."""

    name, compute_capability = "NVIDIA H200", (9, 0)


class Driverless:
    def __init__(self) -> None:
        raise RuntimeError("no driver.\nMore about that.")


def test_the_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(Device=CoreDevice))
    assert str(current_device()) == "NVIDIA H200, compute capability 9.0"
    monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(Device=Driverless))
    with pytest.raises(BackendError, match=r"works here \(no driver\): install its driver, or compile where"):
        current_device()
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(BackendError, match=r"pip install cuda-core cuda-bindings"):
        current_device()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """fake(version): TensorRT of that version, and a GPU."""

    def install(found: str) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=found))
        for module in (toolchains, options, build):
            monkeypatch.setattr(module, "current_device", lambda: Device("NVIDIA H200", "9.0"))

    return install


def test_the_key_of_tensorrt_names_the_gpu(bundle: Bundle, fake: Callable[[str], None]) -> None:
    fake("11.4.0.106")
    toolchain = toolchains.TensorRT(bundle, "tensorrt", None, (), (1, 1), Options(refit=True))
    key = toolchain.key(toolchain.jobs()[1])
    assert key.component == "denoiser"
    assert (key.backend, key.backend_version) == ("tensorrt", "11.4.0.106")
    assert key.device == "NVIDIA H200, compute capability 9.0"
    assert key.flags == {"refit": "yes"}
    plain = toolchains.TensorRT(bundle, "tensorrt", None, (), (1, 1), Options())
    assert plain.key(plain.jobs()[1]).flags == {}


def test_what_tensorrt_does_not_do(bundle: Bundle, fake: Callable[[str], None]) -> None:
    fake("11.3.0.99")
    with pytest.raises(RequestError, match=r"tensorrt 11\.3\.0\.99 may lose .* install 11\.4 or newer"):
        build_bundle(bundle, backend="tensorrt", options=Options(refit=True))
    with pytest.raises(RequestError, match=r"the GPU of this machine, not for 8\.9: leave the targets out"):
        build_bundle(bundle, backend="tensorrt", options=Options(targets=("8.9",)))


def test_tensorrt_needs_a_gpu(
    bundle: Bundle, fake: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("11.4.0.106")
    monkeypatch.setattr(toolchains, "current_device", no_gpu)
    with pytest.raises(BackendError, match="install its driver"):
        build_bundle(bundle, backend="tensorrt")
    monkeypatch.setattr("allaprima.engine.tensorrt.current_device", no_gpu)
    info = next(info for info in compilers() if info.name == "tensorrt")
    assert (info.available, info.reason) == (
        False,
        "no NVIDIA GPU works here (no driver): install its driver",
    )


@needs_rtx
def test_refit_of_rtx_needs_a_driver(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "current_device", no_gpu)
    assert main(["build", str(bundle.folder), "--backend", "tensorrt-rtx", "--refit"]) == 2
    said = capsys.readouterr().err
    assert "tensorrt-rtx makes refittable engines only where an NVIDIA driver is" in said
    assert said.count("\n") == 1


def test_sizes_belong_to_compilers_for_shapes(bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="one engine for all shapes"):
        build_bundle(bundle, backend="ort", sizes=[(64, 64)])


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_what_is_missing_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    def absent(name: str, *_: object) -> None:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(flavours.importlib, "import_module", absent)
    with pytest.raises(BackendError, match=rf'not installed .*pip install "allaprima\[{backend}\]"'):
        build_bundle(bundle, backend=backend)


@needs_rtx
def test_weights_that_can_be_streamed(bundle: Bundle, cache: Path) -> None:
    """A real plan; that it streams shows only on a GPU. A session is told that it could."""
    plain = build_bundle(bundle, backend="tensorrt-rtx")
    assert main(["build", str(bundle.folder), "--backend", "tensorrt-rtx", "--weight-streaming", "-q"]) == 0
    key = plain[0].engine.key
    found = matching_engines(key, lambda _: True)
    assert [file.streams for file in found] == [True, False]
    assert found[0].path.stat().st_size > 0
    session = TENSORRT_RTX.footprint(
        Path("graph"), bundle.component(key.component), found[:1], precision="fp16"
    )
    assert session == Footprint(found[0].path.stat().st_size, 0)


@needs_rtx
def test_the_way_of_tensorrt(bundle: Bundle, cache: Path) -> None:
    script = Path(__file__).with_name("path_of_tensorrt.py")
    done = subprocess.run(
        [sys.executable, str(script), str(bundle.folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    built = seen["built"]
    assert [one["key"]["component"] for one in built] == list(bundle.manifest.components)
    assert seen["reused"] == [True] * len(built)
    assert seen["flags"] == [seen["strongly typed"]] * len(built)  # TensorRT 10 must be told
    for one, config in zip(built, seen["configs"], strict=True):
        assert (config["refit"], config["level"], config["workspace"]) == (True, 2, 2**30)
        assert config["streams"]
        assert config["profiles"] == len(one["key"]["profiles"])
        flags = {"workspace": str(2**30), "level": "2", "refit": "yes", "weight_streaming": "yes"}
        assert one["key"]["flags"] == flags
        assert one["key"]["device"] == "NVIDIA H200, compute capability 9.0"
        assert list(one["files"]) == ["model.plan"]
        assert sorted(path.name for path in Path(one["folder"]).iterdir()) == ["engine.json", "model.plan"]
    timings = timing_name("11.4.0.106", "NVIDIA H200, compute capability 9.0")
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        [timings, *(Path(one["folder"]).name for one in built)]
    )
    assert "compile for tensorrt-rtx in a new one" in seen["other"]
