"""The engine cache on disk: keys, sealing, finding and listing."""

import sys
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from allaprima.bundle import (
    ENGINE_VERSION,
    Bundle,
    BundleError,
    Component,
    Engine,
    EngineKey,
    FileEntry,
    cache_folder,
    engine_key,
    engines,
    find_engine,
    open_bundle,
    read_engine,
    seal_engine,
    writing_engine,
)
from allaprima.bundle.errors import BuildError

WriteBundle = Callable[..., Path]

KEY = EngineKey(
    "denoiser", {"denoiser/model.onnx": "0" * 64}, "ort", "1", "x86_64", "fp32", (), {}, ENGINE_VERSION
)


def seal(key: EngineKey = KEY, cache: Path | None = None, data: bytes = b"engine") -> Engine:
    with writing_engine(key, cache) as folder:
        (folder / "main.blob").write_bytes(data)
        return seal_engine(folder, key, bundle="tiny", main="main.blob", seconds=1.5, error=2e-3)


@pytest.fixture
def bundle(tmp_path: Path, write_bundle: WriteBundle) -> Bundle:
    return open_bundle(write_bundle(tmp_path / "tiny"))


def key_of(bundle: Bundle, **changes: str) -> EngineKey:
    facts = {"backend": "ort", "backend_version": "1", "device": "x86_64", "precision": "fp32", **changes}
    return engine_key(bundle, "denoiser", **facts)


def test_seal_then_find(cache: Path) -> None:
    engine = seal()
    folder = cache / KEY.folder
    assert find_engine(KEY) == folder / "main.blob"
    assert read_engine(folder) == engine
    assert engine.size == 6
    assert [path.name for path in cache.iterdir()] == [KEY.folder]
    assert list(engines()) == [(folder, engine)]


def test_a_folder_of_ones_own(tmp_path: Path, cache: Path) -> None:
    seal(cache=tmp_path / "mine")
    assert find_engine(KEY, tmp_path / "mine") is not None
    assert find_engine(KEY) is None
    assert not cache.exists()


def test_key_says_what_the_bundle_says(bundle: Bundle) -> None:
    key = key_of(bundle)
    assert set(key.graph) == {"denoiser/model.onnx", "denoiser/weights.safetensors"}
    assert key.graph["denoiser/model.onnx"] == bundle.manifest.files["denoiser/model.onnx"].sha256
    assert (key.component, key.allaprima) == ("denoiser", ENGINE_VERSION)


@pytest.mark.parametrize("field", [field.name for field in fields(EngineKey)])
def test_everything_in_the_key_counts(field: str) -> None:
    seal()
    value = {"denoiser/model.onnx": "1" * 64} if field == "graph" else "other"
    other = replace(KEY, **{field: value})
    assert other.folder != KEY.folder
    assert find_engine(other) is None


@pytest.mark.parametrize("file", ["denoiser/model.onnx", "denoiser/weights.safetensors"])
def test_graph_and_weights_are_in_the_key(bundle: Bundle, file: str) -> None:
    files = {**bundle.manifest.files, file: FileEntry(5, "a" * 64)}
    changed = replace(bundle, manifest=replace(bundle.manifest, files=files))
    assert key_of(changed).folder != key_of(bundle).folder


def test_other_files_are_not_in_the_key(bundle: Bundle) -> None:
    files = {**bundle.manifest.files, "tokenizer/tokenizer.json": FileEntry(5, "a" * 64)}
    changed = replace(bundle, manifest=replace(bundle.manifest, files=files))
    assert key_of(changed) == key_of(bundle)


def test_a_graph_at_the_top_of_its_bundle(bundle: Bundle) -> None:
    """Its weights could be any file."""
    component: Component = replace(bundle.component("denoiser"), graph="model.onnx")
    files = {**bundle.manifest.files, "model.onnx": FileEntry(5, "a" * 64)}
    manifest = replace(bundle.manifest, components={"denoiser": component}, files=files)
    assert key_of(replace(bundle, manifest=manifest)).graph.keys() == files.keys()


@pytest.mark.parametrize("name", ["../../escape", "/etc/x", "a b", "..", "c:\\x", ""])
def test_no_name_leaves_the_cache(cache: Path, name: str) -> None:
    """A manifest may call its components anything."""
    key = replace(KEY, component=name)
    engine = seal(key)
    assert engine.key.component == name
    assert [path.name for path in cache.iterdir()] == [key.folder]
    assert [folder.name for folder, _ in engines()] == [key.folder]


def test_leaving_without_a_seal_removes_everything(cache: Path) -> None:
    with writing_engine(KEY) as folder:
        (folder / "main.blob").write_bytes(b"half")
        assert find_engine(KEY) is None
    assert list(cache.iterdir()) == []


def test_what_an_earlier_build_left_is_not_in_the_way(cache: Path) -> None:
    """Not even that of a process with the same number, as containers have it."""
    writers = [writing_engine(KEY) for _ in range(2)]
    folders = [writer.__enter__() for writer in writers]
    assert len(set(folders)) == 2
    assert seal() == read_engine(cache / KEY.folder)
    assert sorted(folder for folder, engine in engines() if engine is None) == sorted(folders)
    for writer in writers:
        writer.__exit__(None, None, None)
    assert [path.name for path in cache.iterdir()] == [KEY.folder]


def test_the_first_of_two_equal_builds_stays(cache: Path) -> None:
    with writing_engine(KEY) as folder:
        (folder / "main.blob").write_bytes(b"second")
        first = seal(data=b"first")
        assert seal_engine(folder, KEY, bundle="tiny", main="main.blob", seconds=1.0, error=0.0) == first
    assert (cache / KEY.folder / "main.blob").read_bytes() == b"first"
    assert len(list(cache.iterdir())) == 1


def test_many_at_once(cache: Path) -> None:
    made: list[Engine] = []
    threads = [threading.Thread(target=lambda: made.append(seal())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert [path.name for path in cache.iterdir()] == [KEY.folder]
    assert find_engine(KEY)


def test_a_damaged_engine_is_replaced(cache: Path) -> None:
    seal()
    (cache / KEY.folder / "main.blob").write_bytes(b"eng1ne")
    (cache / KEY.folder / "stray").mkdir()
    assert find_engine(KEY) is None
    seal()
    assert find_engine(KEY)
    assert not (cache / KEY.folder / "stray").exists()


def test_main_must_have_been_written(cache: Path) -> None:
    with writing_engine(KEY) as folder, pytest.raises(BuildError, match="cannot be written"):
        seal_engine(folder, KEY, bundle="tiny", main="main.blob", seconds=1.0, error=0.0)
    assert find_engine(KEY) is None


def test_a_disk_that_refuses(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> str:
        raise BundleError("main.blob cannot be read: Input/output error")

    # By its module: the package re-exports the function `engines` under the module's name.
    monkeypatch.setattr(sys.modules[seal_engine.__module__], "hash_file", refuse)
    with pytest.raises(BuildError, match="Input/output error"):
        seal()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "engines"):
        with pytest.raises(BuildError, match=r"cannot be written .*set ALLAPRIMA_CACHE"):
            seal(cache=cache)
    assert find_engine(KEY, tmp_path / "file") is None
    assert list(engines(tmp_path / "file")) == []


def test_only_engines_are_listed(cache: Path) -> None:
    """The variable may name a folder in which other things live."""
    seal()
    (cache / "photos").mkdir()
    (cache / "ort-notes.txt").write_text("")
    (cache / replace(KEY, device="x").folder).write_text("not a folder")
    (cache / replace(KEY, device="y").folder).mkdir()
    assert [(folder.name, engine is None) for folder, engine in engines()] == sorted(
        [(KEY.folder, False), (replace(KEY, device="y").folder, True)]
    )


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ALLAPRIMA_CACHE", "~/engines")
    assert cache_folder() == tmp_path / "engines"
    monkeypatch.setenv("ALLAPRIMA_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "allaprima" / "engines"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "allaprima" / "engines"
