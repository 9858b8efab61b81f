"""Numbers and progress as the commands show them."""

import sys

import pytest

from allaprima.cli.output import progress_bar, show_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (15_340_000, "15.3 MB"),
        (2 * 10**12, "2.0 TB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert show_bytes(count) == text


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(quiet=False) as report:
        report("denoise", 1, 2)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(quiet=False) as report:
        report("denoise", 1, 2)
        report("denoise", 2, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "denoise" in err
    assert "2/2" in err
