"""Pictures that are kept for a while."""

from __future__ import annotations

from allaprima.serve.files import Files


def test_names_are_not_to_be_guessed() -> None:
    files = Files(10, 1000, 60)
    names = {files.put(b"x", "png") for _ in range(5)}
    assert len(names) == 5
    assert all(len(name) == 36 and name.endswith(".png") for name in names)
    found = files.get(names.pop())
    assert found is not None
    assert (found.data, found.kind) == (b"x", "png")
    assert files.get("nothing") is None


def test_the_oldest_go_first() -> None:
    files = Files(2, 1000, 60)
    names = [files.put(b"x", "png") for _ in range(3)]
    assert [files.get(name) is None for name in names] == [True, False, False]


def test_bytes_are_bounded() -> None:
    files = Files(10, 100, 60)
    names = [files.put(bytes(40), "png") for _ in range(3)]
    assert [files.get(name) is None for name in names] == [True, False, False]
    large = files.put(bytes(400), "png")
    assert files.get(large) is not None, "what was just made can be fetched"
    assert all(files.get(name) is None for name in names)


def test_time_is_bounded() -> None:
    now = 0.0
    files = Files(10, 100, 60, clock=lambda: now)
    name = files.put(b"x", "png")
    now = 59
    assert files.get(name) is not None
    now = 60
    assert files.get(name) is None
