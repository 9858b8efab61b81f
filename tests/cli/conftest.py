"""Running the command in this process."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from allaprima.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What a run of the command left: exit code, stdout and stderr."""

    code: int
    out: str
    err: str


Allaprima = Callable[..., Outcome]


@pytest.fixture
def allaprima(capsys: pytest.CaptureFixture[str]) -> Allaprima:
    """allaprima("generate", "a cat"): run the command line."""

    def run(*arguments: str) -> Outcome:
        try:
            code = main(arguments)
        except SystemExit as stop:  # argparse leaves this way after --help and --version
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run
