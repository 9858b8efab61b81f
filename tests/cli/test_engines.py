"""`allaprima build` and `allaprima cache`."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from allaprima.bundle import (
    ENGINE_VERSION,
    Bundle,
    Engine,
    EngineKey,
    engine_key,
    open_bundle,
    seal_engine,
    writing_engine,
)
from allaprima.engine import Built, Progress
from allaprima.runtime import backends

Allaprima = Callable[..., SimpleNamespace]
WriteBundle = Callable[..., Path]


@pytest.fixture
def bundle(tmp_path: Path, write_bundle: WriteBundle) -> Bundle:
    """A bundle with one component, denoiser."""
    return open_bundle(write_bundle(tmp_path / "tiny"))


def seal(key: EngineKey) -> tuple[Path, Engine]:
    """An engine of 6 bytes in the cache."""
    with writing_engine(key) as folder:
        (folder / "main.blob").write_bytes(b"engine")
        return folder.with_name(key.folder), seal_engine(
            folder, key, bundle="tiny", main="main.blob", seconds=1.5, error=2e-3
        )


@pytest.fixture
def fresh(bundle: Bundle, cache: Path) -> EngineKey:
    """An engine that may be loaded here, and beside it one of another version of the backend."""
    info = next(info for info in backends() if info.available)
    seal(engine_key(bundle, "denoiser", backend=info.name, backend_version="1", device="x", precision="fp32"))
    key = engine_key(
        bundle,
        "denoiser",
        backend=info.name,
        backend_version=info.version,
        device=info.device,
        precision="fp32",
    )
    seal(key)
    return key


def test_cache_of_nothing(allaprima: Allaprima, cache: Path) -> None:
    assert allaprima("cache", "list").out == f"{cache} holds 0 engines, 0 B\n"
    assert json.loads(allaprima("cache", "list", "--json").out) == []


def test_cache_list(allaprima: Allaprima, fresh: EngineKey) -> None:
    document = json.loads(allaprima("cache", "list", "--json").out)
    assert len(document) == 2
    (ready,) = (entry for entry in document if not entry["stale"])
    assert Path(ready["path"]).name == fresh.folder
    assert ready["engine"]["key"]["allaprima"] == ENGINE_VERSION
    table = allaprima("cache", "list").out
    assert fresh.folder in table
    assert " ready " in table


def test_cache_prune_keeps_what_is_fresh(allaprima: Allaprima, fresh: EngineKey, cache: Path) -> None:
    assert len(json.loads(allaprima("cache", "prune", "--json").out)) == 1
    assert [path.name for path in cache.iterdir()] == [fresh.folder]


def test_cache_clear(allaprima: Allaprima, fresh: EngineKey, cache: Path) -> None:
    assert "lost 2 engines" in allaprima("cache", "clear").out
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("action", ["prune", "clear"])
def test_only_engines_are_removed(allaprima: Allaprima, cache: Path, action: str) -> None:
    """The variable may name a folder in which other things live."""
    (cache / "photos").mkdir(parents=True)
    (cache / "photos" / "me.png").write_text("x")
    (cache / "notes.txt").write_text("x")
    assert allaprima("cache", action).code == 0
    assert (cache / "photos" / "me.png").exists()
    assert (cache / "notes.txt").exists()


def test_cache_wants_an_action(allaprima: Allaprima) -> None:
    assert allaprima("cache").code == 2
    assert "invalid choice: 'burn'" in allaprima("cache", "burn").err


def test_build(allaprima: Allaprima, bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def build_bundle(
        opened: Bundle, *, progress: Callable[[Progress], None], **options: Any
    ) -> tuple[Built, ...]:
        asked.update(options, bundle=opened)
        progress(Progress("denoiser: compile", 0, 3))
        key = engine_key(opened, "denoiser", backend="ort", backend_version="1", device="x", precision="fp32")
        folder, engine = seal(key)
        return (Built("denoiser", folder, engine, reused=False),)

    monkeypatch.setattr("allaprima.engine.build_bundle", build_bundle)
    words = ("build", str(bundle.folder), "--backend", "ort", "--precision", "fp32")
    outcome = allaprima(*words)
    assert outcome.code == 0
    plain = {"sizes": (), "batch": (1, 1), "options": None, "components": (), "cache": None}
    assert asked == {"bundle": bundle, "backend": "ort", "precision": "fp32", **plain}
    for text in ("denoiser", "6 B", "2.0e-03", "in 1.5 s"):
        assert text in outcome.out
    document = json.loads(allaprima(*words, "--json").out)
    assert document[0]["key"]["component"] == "denoiser"
    assert allaprima(*words, "--quiet").out == ""
    allaprima(*words, "--components", "denoiser, vae_decoder")
    assert asked["components"] == ("denoiser", "vae_decoder")


def test_build_of_nothing(allaprima: Allaprima, tmp_path: Path) -> None:
    assert allaprima("build", str(tmp_path / "none")).code == 2
