"""Engines are built once for the whole run, since TensorRT takes minutes for each."""

from pathlib import Path

import pytest

from allaprima.bundle import Bundle, open_bundle, resolve


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "engines"


@pytest.fixture(autouse=True)
def cache(engines: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the one that every other test has for itself."""
    monkeypatch.setenv("ALLAPRIMA_CACHE", str(engines))
    return engines


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A checkpoint with tiny networks and random weights, in float16; needs the libraries of export."""
    pytest.importorskip("diffusers", reason='needs pip install "allaprima[export]"')
    from allaprima.export import export_checkpoint

    from ..export.conftest import write_tiny

    folder = tmp_path_factory.mktemp("tiny")
    return export_checkpoint(str(write_tiny(folder / "checkpoint")), folder / "bundle")


@pytest.fixture(params=["shapes", "tiny"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """The small model of each kind that there is."""
    return open_bundle(resolve("shapes")) if request.param == "shapes" else request.getfixturevalue("tiny")
