"""Engines are built once for the whole run, since TensorRT takes minutes for each."""

import os
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
    """A checkpoint with tiny networks and random weights, in float16.

    Its bundle is in the folder that ALLAPRIMA_TINY names, or is exported, with the libraries for that.
    """
    if folder := os.environ.get("ALLAPRIMA_TINY"):
        return open_bundle(Path(folder))
    needs = 'needs pip install "allaprima[export]", or ALLAPRIMA_TINY, the folder that "make tiny" makes'
    pytest.importorskip("torch", minversion="2.13", reason=needs)
    pytest.importorskip("diffusers", reason=needs)
    from allaprima.export import export_checkpoint

    from ..export.conftest import write_tiny

    made = tmp_path_factory.mktemp("tiny")
    return export_checkpoint(str(write_tiny(made / "checkpoint")), made / "bundle")


@pytest.fixture(params=["shapes", "tiny"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """The small model of each kind that there is."""
    return open_bundle(resolve("shapes")) if request.param == "shapes" else request.getfixturevalue("tiny")
