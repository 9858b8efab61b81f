"""Building a bundle's engines with real backends: what is kept, what is trusted, and what is left behind."""

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import allaprima.engine.toolchains
import allaprima.runtime.opener
from allaprima.bundle import (
    BackendError,
    BuildError,
    Bundle,
    BundleError,
    EngineFile,
    RequestError,
    find_engine,
    read_engine,
)
from allaprima.engine import Built, Options, Progress, build_bundle, entries, prune
from allaprima.runtime import Pipeline, backends
from allaprima.runtime.backends import compiles, find_engines
from allaprima.runtime.sessions import openvino

from ..runtime.conftest import DENOISER, HEADER, TEXT_ENCODER

AVAILABLE = [info.name for info in backends() if info.available and compiles(info.name)]
COMPONENTS = ["text_encoder", "denoiser", "vae_decoder"]


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(bundle: Bundle, backend: str, **options: Any) -> tuple[Built, ...]:
    return build_bundle(bundle, backend=backend, precision="fp32", **options)


def no_compiler(*_: Any, **__: Any) -> Path:
    raise AssertionError("something is compiled that the cache has")


def other_graph(text: str) -> Callable[..., Path]:
    """A compiler that takes this graph instead of the bundle's."""
    compile_engine = allaprima.engine.toolchains.compile_engine

    def compile_other(graph: Path, component: Any, folder: Path, *args: Any, **options: Any) -> Path:
        onnx.save(onnx.parser.parse_model(HEADER + text), other := folder.parent / "other.onnx")
        try:
            return compile_engine(other, component, folder, *args, **options)
        finally:
            other.unlink()

    return compile_other


def paint(bundle: Bundle, backend: str) -> np.ndarray[Any, Any]:
    with Pipeline.open(bundle.folder, backend=backend, precision="fp32", threads=1) as pipeline:
        return np.asarray(pipeline.generate("a", seed=3).images[0])


def test_build(bundle: Bundle, backend: str, cache: Path) -> None:
    stages: list[Progress] = []
    built = build(bundle, backend, progress=stages.append)
    assert [one.component for one in built] == COMPONENTS
    for one in built:
        assert one.folder.parent == cache
        assert not one.reused
        assert read_engine(one.folder) == one.engine
        assert one.engine.key.component == one.component
        assert (one.engine.bundle, one.engine.key.backend) == ("tiny", backend)
        assert one.engine.error < 1e-4
        assert one.engine.size > 0
        assert find_engine(one.engine.key) == one.folder / one.engine.main
    assert [stage.done for stage in stages] == list(range(9))
    assert {stage.total for stage in stages} == {9}
    assert stages[1].stage == "text_encoder: verify"
    assert [path.name for path in sorted(cache.iterdir())] == sorted(one.folder.name for one in built)


def test_files_are_the_owners_alone(bundle: Bundle, backend: str) -> None:
    for one in build(bundle, backend):
        assert one.folder.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in one.folder.iterdir()} == {0o600}


def test_engines_are_reused(bundle: Bundle, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(bundle, backend)
    monkeypatch.setattr(allaprima.engine.toolchains, "compile_engine", no_compiler)
    second = build(bundle, backend)
    assert all(one.reused for one in second)
    assert [one.engine for one in second] == [one.engine for one in first]


def test_pipeline_loads_from_the_cache(bundle: Bundle, backend: str) -> None:
    """With the graphs overwritten (`open` looks at sizes only), there is nothing but the engines to load."""
    wanted = paint(bundle, backend)
    build(bundle, backend)
    for role in COMPONENTS:
        graph = bundle.path(bundle.component(role).graph)
        graph.write_bytes(b"x" * graph.stat().st_size)
    np.testing.assert_array_equal(paint(bundle, backend), wanted)
    for one in entries():
        (one.path / "engine.json").unlink()
    with pytest.raises(BackendError, match="cannot load"):
        paint(bundle, backend)


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path, **fields: Any) -> None:
    sidecar = path.with_name("engine.json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **fields}))


def lead_out(path: Path) -> None:
    """The sidecar names a file outside its folder, which is there and is whole."""
    (path.parent.parent / "main").write_bytes(b"")
    entry = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    edit(path, files={"../main": entry}, main="../main")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "one bit": flip,
    "no main file": Path.unlink,
    "empty": lambda main: main.write_bytes(b""),
    "no sidecar": lambda main: main.with_name("engine.json").unlink(),
    "half a sidecar": lambda main: truncate(main.with_name("engine.json")),
    "not text": lambda main: main.with_name("engine.json").write_bytes(b"\xff\xfe\x00"),
    "unknown field": lambda main: edit(main, colour="red"),
    "missing main": lambda main: edit(main, main="other.blob"),
    "a way out": lead_out,
    "another key": lambda main: edit(main, key={**read_engine(main.parent).key.to_json(), "device": "x"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_engine_is_not_loaded(bundle: Bundle, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(bundle, "ort")
    DAMAGES[damage](first[0].folder / first[0].engine.main)
    assert find_engine(first[0].engine.key) is None
    opened: list[Sequence[EngineFile]] = []
    open_session = allaprima.runtime.opener.open_session

    def watch(*args: Any, engines: Sequence[EngineFile], **options: Any) -> Any:
        opened.append(engines)
        return open_session(*args, engines=engines, **options)

    monkeypatch.setattr(allaprima.runtime.opener, "open_session", watch)
    paint(bundle, "ort")
    assert opened == [(), *((EngineFile(one.folder / one.engine.main),) for one in first[1:])]
    second = build(bundle, "ort")
    assert [one.reused for one in second] == [False, True, True]
    assert find_engine(first[0].engine.key) == second[0].folder / second[0].engine.main
    assert len(entries()) == 3


@pytest.mark.parametrize("stop", [KeyboardInterrupt, BackendError])
def test_an_interrupted_build_leaves_nothing(
    bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    def compile_half(graph: Path, component: object, folder: Path, *_: object, **__: object) -> Path:
        (folder / "model.onnx").write_bytes(b"half")
        raise stop

    monkeypatch.setattr(allaprima.engine.toolchains, "compile_engine", compile_half)
    with pytest.raises(stop):
        build(bundle, "ort")
    assert list(cache.iterdir()) == []


KILLED = """
import os, signal, sys
from allaprima.bundle import open_bundle
from allaprima.engine import build_bundle, toolchains

def compile_half(graph, component, folder, *args, **options):
    (folder / "model.onnx").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

toolchains.compile_engine = compile_half
build_bundle(open_bundle(sys.argv[1]), backend="ort", precision="fp32")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_build_leaves_nothing_that_looks_finished(bundle: Bundle, cache: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(bundle.folder)]
    done = subprocess.run(command, env={**os.environ, "ALLAPRIMA_CACHE": str(cache)}, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = entries()
    assert left.path.name.startswith(".")
    assert left.engine is None
    assert left.stale == "unfinished or damaged"
    assert not any(one.reused for one in build(bundle, "ort"))
    assert [entry.path for entry in prune()] == [left.path]
    assert all(one.reused for one in build(bundle, "ort"))


BUILDING = """
import sys, time
from pathlib import Path
from allaprima.bundle import open_bundle
from allaprima.engine import build_bundle, toolchains

compile_engine = toolchains.compile_engine

def compile_slowly(*args, **options):
    Path(sys.argv[2], "compiled").open("a").write("x")
    time.sleep(1)
    return compile_engine(*args, **options)

toolchains.compile_engine = compile_slowly
stages = []
built = build_bundle(
    open_bundle(sys.argv[1]), backend="ort", precision="fp32", progress=lambda one: stages.append(one.stage)
)
print(sum(one.reused for one in built), sum("another process" in stage for stage in stages))
"""


def test_two_builds_at_once_do_the_work_once(bundle: Bundle, cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILDING, str(bundle.folder), str(tmp_path)]
    both = [
        subprocess.Popen(
            command, env={**os.environ, "ALLAPRIMA_CACHE": str(cache)}, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    while not (tmp_path / "compiled").exists():
        assert any(one.poll() is None for one in both)
        time.sleep(0.05)
    assert prune() == ()  # what is being built is not for others to remove
    said = [tuple(map(int, one.communicate()[0].split())) for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert (tmp_path / "compiled").read_text() == "xxx"
    assert sum(reused for reused, _ in said) == 3
    assert sum(waited for _, waited in said) >= 1
    assert len(list(cache.iterdir())) == 3


def test_the_reason_for_building_again_is_said(
    bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(bundle, "ort")
    assert {one.reason for one in first} == {""}
    truncate(first[0].folder / first[0].engine.main)
    flip(first[1].folder / first[1].engine.main)
    (first[2].folder / "engine.json").unlink()
    second = build(bundle, "ort")
    assert re.search(r"text_encoder.*bytes, should have \d+", second[0].reason)
    assert "its sha256 is another" in second[1].reason
    assert "is not a finished engine" in second[2].reason
    assert {one.reason for one in build(bundle, "ort")} == {""}
    old = first[0].engine.key.backend_version
    monkeypatch.setattr("allaprima.runtime.sessions.ort.version", lambda: "99")
    third = build(bundle, "ort")
    assert {one.reason for one in third} == {f"the backend's version was {old}, is 99"}


@pytest.mark.parametrize("changed", ["version", "device"])
def test_another_driver_or_device_is_another_engine(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    old = build(bundle, "ort")
    monkeypatch.setattr(f"allaprima.runtime.sessions.ort.{changed}", lambda: "another")
    new = build(bundle, "ort")
    assert not any(one.reused for one in new)
    assert {one.folder for one in old}.isdisjoint(one.folder for one in new)
    assert {entry.path for entry in prune()} == {one.folder for one in old}
    assert {entry.path for entry in entries()} == {one.folder for one in new}


def test_precisions_are_kept_apart(bundle: Bundle) -> None:
    info = next((info for info in backends() if info.converts and len(info.precisions) > 1), None)
    if info is None:
        pytest.skip("no backend here has a choice of precisions")
    built = {
        precision: build_bundle(bundle, backend=info.name, precision=precision)
        for precision in info.precisions
    }
    assert len({one.folder for many in built.values() for one in many}) == 3 * len(info.precisions)
    for precision, many in built.items():
        assert {one.engine.key.precision for one in many} == {precision}
        assert all(one.engine.error < 0.1 for one in many)
    default = build_bundle(bundle, backend=info.name)
    assert all(one.reused and one.engine.key.precision == info.precisions[0] for one in default)


def test_a_precision_that_the_backend_lacks(bundle: Bundle, cache: Path) -> None:
    with pytest.raises(BackendError, match="use the backend openvino, or export with --precision fp16"):
        build_bundle(bundle, backend="ort", precision="fp16")
    assert not cache.exists() or not list(cache.iterdir())
    with pytest.raises(BackendError, match="unknown precision 'fp8'"):
        build_bundle(bundle, backend="ort", precision="fp8")


def test_some_components(bundle: Bundle, backend: str) -> None:
    built = build(bundle, backend, components=["vae_decoder", "text_encoder"])
    assert [each.component for each in built] == ["text_encoder", "vae_decoder"]
    with pytest.raises(
        RequestError, match=r"no component 'unet': choose from text_encoder, denoiser, vae_decoder$"
    ):
        build(bundle, backend, components=["unet"])


def test_unknown_backend(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="unknown backend 'abacus'"):
        build_bundle(bundle, backend="abacus")


def test_a_cache_that_cannot_be_written(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=r"file/engines cannot be written .*ALLAPRIMA_CACHE"):
        build(bundle, "ort", cache=tmp_path / "file" / "engines")
    monkeypatch.setenv("ALLAPRIMA_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="cannot be written"):
        build(bundle, "ort")
    paint(bundle, "ort")  # needs no cache


def test_a_full_disk(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(allaprima.engine.toolchains, "compile_engine", refuse)
    with pytest.raises(BuildError, match="No space left on device"):
        build(bundle, "ort")
    assert list(cache.iterdir()) == []


def test_a_wrong_engine_is_refused(
    bundle: Bundle, backend: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = TEXT_ENCODER.replace("= Sin", "= Cos")
    monkeypatch.setattr(allaprima.engine.toolchains, "compile_engine", other_graph(wrong))
    with pytest.raises(BuildError, match=r"text_encoder: the engine in fp32 is off by \d"):
        build(bundle, backend)
    assert list(cache.iterdir()) == []


def test_outputs_that_are_not_finite(
    bundle: Bundle, backend: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = TEXT_ENCODER.replace("= Sin (phase)", "= Log (lower)").replace(
        "last_hidden_state =", "lower = Neg (phase)\n last_hidden_state ="
    )
    monkeypatch.setattr(allaprima.engine.toolchains, "compile_engine", other_graph(wrong))
    with pytest.raises(BuildError, match="last_hidden_state is not finite in fp32"):
        build(bundle, backend)
    assert list(cache.iterdir()) == []


def test_a_graph_that_does_not_compile(bundle: Bundle, backend: str, cache: Path) -> None:
    graph = bundle.path(bundle.component("text_encoder").graph)
    graph.write_bytes(b"x" * graph.stat().st_size)
    with pytest.raises(BackendError, match="cannot compile"):
        build(bundle, backend)
    assert list(cache.iterdir()) == []


def test_a_graph_that_is_not_its_manifests(
    bundle: Bundle, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has the tensors of another component."""
    monkeypatch.setattr(allaprima.engine.toolchains, "compile_engine", other_graph(DENOISER))
    with pytest.raises(BackendError, match="disagree"):
        build(bundle, backend)


def test_reading_what_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a finished engine"):
        read_engine(tmp_path)


def test_fixed_shapes_of_openvino(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines for one size beside the one for all: used for that size, loaded when first needed."""
    pytest.importorskip("openvino")
    wanted = {size: paint_size(bundle, *size) for size in ((64, 32), (32, 32))}
    built = build_bundle(bundle, backend="openvino", precision="fp32", sizes=[(32, 64)])
    assert [(one.component, bool(one.engine.key.profiles)) for one in built] == [
        ("text_encoder", False),
        ("denoiser", False),
        ("denoiser", True),
        ("vae_decoder", False),
        ("vae_decoder", True),
    ]
    assert all(one.engine.error is not None and one.engine.error < 1e-3 for one in built)
    assert [file.profiles for file in find_engines(bundle, "denoiser", "openvino", precision="fp32")] == [
        built[2].engine.key.profiles,
        (),
    ]
    loaded: list[str] = []
    import_engine = openvino.import_engine

    def watch(path: Path, *rest: Any) -> Any:
        loaded.append(path.parent.name)
        return import_engine(path, *rest)

    monkeypatch.setattr(openvino, "import_engine", watch)
    assert paint_size(bundle, 64, 32) == wanted[64, 32]
    assert loaded == [built[0].folder.name, built[2].folder.name, built[4].folder.name]
    assert paint_size(bundle, 32, 32) == wanted[32, 32]


def paint_size(bundle: Bundle, height: int, width: int) -> bytes:
    with Pipeline.open(bundle.folder, backend="openvino", precision="fp32", threads=1) as pipeline:
        result = pipeline.generate("a red circle", seed=2, num_inference_steps=3, height=height, width=width)
        return result.images[0].tobytes()


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("ort", {"sizes": [(64, 64)]}, "ort compiles one engine for all shapes"),
        ("openvino", {"sizes": [(64, 64), (32, 64), (64, 32)]}, "at most 2 sizes"),
        ("openvino", {"batch": (1, 4)}, "at most 2 sizes in one batch"),
        ("openvino", {"sizes": [(60, 64)]}, "60x64 cannot be painted"),
        ("openvino", {"options": Options(level=3)}, "no such options: they belong to tensorrt and"),
    ],
)
def test_shapes_that_make_no_sense(
    bundle: Bundle, backend: str, options: dict[str, Any], message: str
) -> None:
    pytest.importorskip({"ort": "onnxruntime"}.get(backend, backend))
    with pytest.raises(RequestError, match=message):
        build_bundle(bundle, backend=backend, precision="fp32", **options)
    assert entries() == ()
