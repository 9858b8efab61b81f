"""Bundles on disk: all or nothing when written, checked when opened, found by name."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import allaprima.bundle.store as store
from allaprima.bundle import (
    BundleError,
    BundleWriter,
    Manifest,
    builtin_bundle,
    builtin_names,
    open_bundle,
    resolve,
)

WriteBundle = Callable[..., Path]


def test_write_then_open(tmp_path: Path, write_bundle: WriteBundle, manifest: Manifest) -> None:
    folder = write_bundle(tmp_path / "deep" / "down" / "tiny")
    bundle = open_bundle(str(folder), verify=True)
    assert replace(bundle.manifest, files={}) == manifest
    assert list(bundle.manifest.files) == sorted(bundle.manifest.files)
    assert bundle.manifest.files["denoiser/weights.safetensors"].size == 7000
    assert bundle.path("denoiser/model.onnx").read_bytes() == b"graph"
    assert bundle.component("denoiser").precision == "fp16"
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_bundle_refuses_foreign_names(tmp_path: Path, write_bundle: WriteBundle) -> None:
    bundle = open_bundle(write_bundle(tmp_path / "tiny"))
    with pytest.raises(BundleError, match="no component 'unet': it has denoiser"):
        bundle.component("unet")
    with pytest.raises(BundleError, match="leaves the bundle"):
        bundle.path("../secret")


def test_commit_returns_the_opened_bundle(tmp_path: Path, manifest: Manifest) -> None:
    with BundleWriter(tmp_path / "tiny") as writer:
        for name in manifest.required():
            (writer.folder / name).parent.mkdir(exist_ok=True)
            (writer.folder / name).write_text("x")
        bundle = writer.commit(manifest)
    assert open_bundle(tmp_path / "tiny") == bundle


@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_path(empty: str) -> None:
    for action in (open_bundle, resolve, BundleWriter):
        with pytest.raises(BundleError, match="is empty"):
            action(empty)


def test_open_what_is_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        open_bundle(tmp_path / "none")
    with pytest.raises(BundleError, match=r"is not a bundle: it has no bundle\.json"):
        open_bundle(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="is a file"):
        open_bundle(tmp_path / "file")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\x00", b'{"schema": 1,}'])
def test_broken_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "bundle.json").write_bytes(text)
    with pytest.raises(BundleError, match=r"bundle\.json is not valid JSON"):
        open_bundle(tmp_path)


def test_manifest_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text('{"schema": 99}')
    with pytest.raises(BundleError, match=r"bundle\.json: written by a newer allaprima, schema 99 > 2"):
        open_bundle(tmp_path)


def test_damage_is_found(tmp_path: Path, write_bundle: WriteBundle) -> None:
    folder = write_bundle(tmp_path / "tiny")
    data = folder / "denoiser" / "weights.safetensors"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match=r"weights\.safetensors is truncated: 6999 bytes, should be 7000"):
        open_bundle(folder)
    data.write_bytes(whole + b"!")
    with pytest.raises(BundleError, match="too long: 7001 bytes"):
        open_bundle(folder)
    data.write_bytes(b"W" + whole[1:])
    open_bundle(folder)  # the size is right: only a verifying reader pays for the hash
    with pytest.raises(BundleError, match=r"weights\.safetensors is corrupt"):
        open_bundle(folder, verify=True)
    data.unlink()
    with pytest.raises(BundleError, match="is missing"):
        open_bundle(folder)


def test_used_files_must_be_listed(tmp_path: Path, write_bundle: WriteBundle) -> None:
    path = write_bundle(tmp_path / "tiny") / "bundle.json"
    document = json.loads(path.read_text())
    del document["files"]["tokenizer/tokenizer.json"]
    path.write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"'tokenizer/tokenizer\.json' is used but not listed"):
        open_bundle(path.parent)


def test_abandoned_writer_leaves_nothing(tmp_path: Path, manifest: Manifest) -> None:
    def fail() -> None:
        with BundleWriter(tmp_path / "deep" / "tiny") as writer:
            (writer.folder / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with BundleWriter(tmp_path / "other"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_commit_wants_the_files_it_names(tmp_path: Path, write_bundle: WriteBundle) -> None:
    with pytest.raises(
        BundleError, match=r"'tokenizer/tokenizer\.json' is in the manifest but was not written"
    ):
        write_bundle(tmp_path / "tiny", files={"denoiser/model.onnx": b""})
    with pytest.raises(BundleError, match="leaves the bundle or is not a plain"):
        write_bundle(tmp_path / "tiny", files={"odd:name": b""})
    assert list(tmp_path.iterdir()) == []


def test_existing_target(tmp_path: Path, write_bundle: WriteBundle) -> None:
    folder = write_bundle(tmp_path / "tiny")
    stray = folder / "stray"
    stray.write_text("x")
    with pytest.raises(BundleError, match="exists already"):
        write_bundle(folder)
    assert stray.exists()
    write_bundle(folder, overwrite=True)
    assert not stray.exists()
    open_bundle(folder, verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_overwrite_never_deletes_what_is_not_ours(tmp_path: Path, write_bundle: WriteBundle) -> None:
    home = tmp_path / "home"
    home.mkdir()
    write_bundle(home, overwrite=True)  # an empty folder holds nothing to lose
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "me.png").write_text("x")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        write_bundle(photos, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="is a file"):
        write_bundle(tmp_path / "file", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "home", "photos"]


def test_failed_swap_restores_the_old_bundle(
    tmp_path: Path, write_bundle: WriteBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_bundle(tmp_path / "tiny")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(BundleError, match="cannot be written: No space left"):
        write_bundle(folder, overwrite=True)
    open_bundle(folder, verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_unwritable_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"), BundleWriter(tmp_path / "file" / "tiny"):
        pass


@pytest.fixture
def shelf(tmp_path: Path, write_bundle: WriteBundle, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Built-in bundles "moons" and "shapes", and an empty current folder."""
    shelf, here = tmp_path / "shelf", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    folders = {name: write_bundle(shelf / name) for name in ("moons", "shapes")}
    monkeypatch.setattr(store, "_builtin", lambda: folders)
    return shelf


def test_builtin(shelf: Path) -> None:
    assert builtin_names() == ("moons", "shapes")
    assert builtin_bundle("moons") == shelf / "moons"
    with pytest.raises(BundleError, match=r"suns: .*\(built-in bundles: moons, shapes\)"):
        builtin_bundle("suns")


def test_resolve(shelf: Path, write_bundle: WriteBundle) -> None:
    assert resolve("shapes") == shelf / "shapes"
    with pytest.raises(BundleError, match=r"no such folder, and no built-in .*moons, shapes"):
        resolve("shape")
    Path("shapes").mkdir()
    assert resolve("shapes") == shelf / "shapes"  # a folder of that name that is no bundle
    assert resolve(f".{os.sep}shapes") == Path("shapes")
    write_bundle(Path("moons"))
    assert resolve("moons") == Path("moons")


def test_builtin_folder_is_data_of_the_runtime() -> None:
    for name in builtin_names():
        assert builtin_bundle(name).parts[-3:] == ("runtime", "bundles", name)
        open_bundle(builtin_bundle(name), verify=True)
