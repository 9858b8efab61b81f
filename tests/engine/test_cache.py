"""Looking after the cache: what counts as stale, and that only that goes."""

from dataclasses import replace
from pathlib import Path

import pytest

from allaprima.bundle import ENGINE_VERSION, EngineKey, seal_engine, writing_engine
from allaprima.engine import clear, entries, prune
from allaprima.runtime import backends

HERE = next(info for info in backends() if info.available)
FRESH = EngineKey("denoiser", {}, HERE.name, HERE.version, HERE.device, "fp32", (), {}, ENGINE_VERSION)
STALE = {
    "the backend abacus is not installed": replace(FRESH, backend="abacus"),
    f"built with {HERE.name} 0, installed is {HERE.version}": replace(FRESH, backend_version="0"),
    "built for another device: a PDP-11": replace(FRESH, device="a PDP-11"),
    "built by allaprima 0": replace(FRESH, allaprima="0"),
}


def seal(key: EngineKey) -> None:
    with writing_engine(key) as folder:
        (folder / "main.blob").write_bytes(b"engine")
        seal_engine(folder, key, bundle="tiny", main="main.blob", seconds=1.0, error=0.0)


@pytest.fixture
def full(cache: Path) -> Path:
    """A cache with one fresh engine, one of each stale kind, one damaged, and things that are no engines."""
    for key in (FRESH, *STALE.values()):
        seal(key)
    (cache / replace(FRESH, component="half").folder).mkdir()
    (cache / "photos").mkdir()
    (cache / "notes.txt").write_text("x")
    return cache


def test_entries(full: Path) -> None:
    found = {entry.path.name: entry for entry in entries()}
    assert len(found) == 6
    assert found[FRESH.folder].stale == ""
    assert found[FRESH.folder].size > 6
    for why, key in STALE.items():
        assert found[key.folder].stale == why
    half = found[replace(FRESH, component="half").folder]
    assert (half.engine, half.size, half.stale) == (None, 0, "unfinished or damaged")


def test_prune(full: Path) -> None:
    assert len(prune()) == 5
    assert [entry.path.name for entry in entries()] == [FRESH.folder]
    assert prune() == ()
    assert (full / "photos").exists()


def test_clear(full: Path) -> None:
    assert len(clear()) == 6
    assert sorted(path.name for path in full.iterdir()) == ["notes.txt", "photos"]


def test_what_cannot_be_removed_is_not_said_to_be(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    assert clear() == ()


def test_no_cache_at_all(cache: Path) -> None:
    assert entries() == prune() == clear() == ()
    assert not cache.exists()
