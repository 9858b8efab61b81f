"""The door: help, unknown words, and what becomes of errors."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest

from allaprima.bundle import VERSION, BundleError
from allaprima.cli.main import COMMANDS, main

Allaprima = Callable[..., SimpleNamespace]

HEAVY = (
    "numpy",
    "PIL",
    "tokenizers",
    "rich",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "openvino",
)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(allaprima: Allaprima, arguments: list[str]) -> None:
    outcome = allaprima(*arguments)
    assert outcome.code == 0
    for name, summary in COMMANDS.items():
        assert f"  {name} " in outcome.out
        assert summary in outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(allaprima: Allaprima, command: str) -> None:
    outcome = allaprima(command, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"usage: allaprima {command}")


@pytest.mark.parametrize("command", ["--help", "generate --help", "--version"])
def test_help_is_light(command: str) -> None:
    """What opens fast imports little; a count of modules is steadier than a stopwatch."""
    code = (
        "import sys\nfrom allaprima.cli.main import main\n"
        f"try: main({command.split()!r})\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_version(allaprima: Allaprima) -> None:
    assert allaprima("--version").out == f"allaprima {VERSION}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate", "a cat"], "unknown command 'genrate': did you mean 'generate'?"),
        (["xyz"], "unknown command 'xyz': choose from export, "),
        (["--colour"], "unknown command '--colour'"),
        (["generate"], "the following arguments are required: PROMPT (see: allaprima generate --help)"),
        (["generate", "a cat", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["generate", "a", "b", "c"], "unrecognized arguments: c"),
        (["inspect", "x", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_misuse_is_one_line(allaprima: Allaprima, arguments: list[str], message: str) -> None:
    outcome = allaprima(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith(f"allaprima: error: {message}")
    assert outcome.err.count("\n") == 1


@pytest.fixture
def break_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """break_with(error): `allaprima doctor` raises it."""

    def set_error(error: BaseException) -> None:
        def run(options: object) -> None:
            raise error

        module = ModuleType("allaprima.cli.doctor")
        module.__dict__.update(configure=lambda parser: None, run=run)
        found = importlib.import_module
        monkeypatch.setattr(
            importlib, "import_module", lambda name: module if name == module.__name__ else found(name)
        )

    return set_error


def test_refusal(
    allaprima: Allaprima, break_with: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALLAPRIMA_DEBUG", raising=False)
    break_with(BundleError("no such folder"))
    outcome = allaprima("doctor")
    assert (outcome.code, outcome.err) == (2, "allaprima: error: no such folder\n")
    monkeypatch.setenv("ALLAPRIMA_DEBUG", "1")
    assert "Traceback" in allaprima("doctor").err


def test_interrupt(allaprima: Allaprima, break_with: Callable[[BaseException], None]) -> None:
    break_with(KeyboardInterrupt())
    outcome = allaprima("doctor")
    assert (outcome.code, outcome.err) == (130, "allaprima: interrupted\n")


def test_defects_keep_their_traceback(break_with: Callable[[BaseException], None]) -> None:
    break_with(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "import sys; from allaprima.cli.main import main; sys.exit(main(['doctor', '--json']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
