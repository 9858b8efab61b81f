"""Timing caches: private while a build runs, whole when it is done, and known to the cache's commands."""

import threading
from pathlib import Path

import pytest

from allaprima.cli.main import main
from allaprima.engine import cache as engine_cache
from allaprima.engine import clear, entries, prune
from allaprima.engine.timing import timing_cache, timing_caches, timing_name

H200 = "NVIDIA H200, compute capability 9.0"
NAME = "tensorrt-11.4.0.106-NVIDIA-H200-compute-capability-9-0.timing"


@pytest.fixture
def folder(cache: Path) -> Path:
    """An engine's folder that is being built."""
    folder = cache / "private"
    folder.mkdir(parents=True)
    return folder


def test_the_name_says_version_and_device() -> None:
    assert timing_name("11.4.0.106", H200) == NAME


def test_what_a_build_learned_is_there_for_the_next(cache: Path, folder: Path) -> None:
    with timing_cache(folder, cache, "11.4.0.106", H200) as copy:
        assert not copy.exists()
        copy.write_bytes(b"one")
        assert not (cache / NAME).exists()  # not before it is whole
    assert sorted(path.name for path in cache.iterdir()) == ["private", NAME]
    assert list(folder.iterdir()) == []
    with timing_cache(folder, cache, "11.4.0.106", H200) as copy:
        assert copy.read_bytes() == b"one"
    with timing_cache(folder, cache, "11.4.1.2", H200) as copy:
        assert not copy.exists()


def test_a_failed_build_leaves_what_was_known(cache: Path, folder: Path) -> None:
    (cache / NAME).write_bytes(b"known")

    def fail(copy: Path) -> None:
        copy.write_bytes(b"hal")
        raise ValueError("the GPU fell off")

    with pytest.raises(ValueError, match="fell off"), timing_cache(folder, cache, "11.4.0.106", H200) as copy:
        fail(copy)
    assert (cache / NAME).read_bytes() == b"known"
    assert sorted(path.name for path in cache.iterdir()) == ["private", NAME]


def test_builds_on_one_gpu_wait_for_each_other(cache: Path, folder: Path) -> None:
    inside = threading.Event()

    def other() -> None:
        with timing_cache(folder, cache, "11.4.0.106", H200):
            inside.set()

    waiting = threading.Thread(target=other)
    with timing_cache(folder, cache, "11.4.0.106", H200):
        waiting.start()
        assert not inside.wait(0.3)
    waiting.join(10)
    assert inside.is_set()


@pytest.fixture
def full(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Timing caches of the installed version and of another, and files that only look like it."""
    cache.mkdir(parents=True)
    monkeypatch.setattr(engine_cache, "version", {"tensorrt": "11.4.0.106"}.__getitem__)
    for name in (NAME, timing_name("10.16.1.11", H200), "tensorrt-notes.timing", "tensorrt-11.4.0.106-x.txt"):
        (cache / name).write_bytes(b"12345")
    return cache


def test_prune_removes_those_of_other_versions(full: Path) -> None:
    assert [(entry.path.name, entry.size, entry.stale) for entry in entries()] == [
        (timing_name("10.16.1.11", H200), 5, "built with tensorrt 10.16.1.11, installed is 11.4.0.106"),
        (NAME, 5, ""),
    ]
    assert [entry.path.name for entry in prune()] == [timing_name("10.16.1.11", H200)]
    assert [path.name for path, _ in timing_caches(full)] == [NAME]
    assert [entry.path.name for entry in clear()] == [NAME]
    assert sorted(path.name for path in full.iterdir()) == [
        "tensorrt-11.4.0.106-x.txt",
        "tensorrt-notes.timing",
    ]


def test_list_shows_them(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "list"]) == 0
    said = capsys.readouterr().out
    assert "timings" in said
    assert "holds 0 engines, 10 B" in said
