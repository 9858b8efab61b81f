"""The door of the command line: finds the subcommand, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn, Protocol, cast

from allaprima.bundle import VERSION, AllaprimaError, RequestError

COMMANDS = {
    "export": "turn a checkpoint into a bundle (needs torch)",
    "quantize": "let a bundle's denoiser compute in int8",
    "build": "compile a bundle for this machine",
    "generate": "paint pictures from a prompt",
    "serve": "paint over HTTP, for many users at once",
    "bench": "measure speed, and compare two measurements",
    "inspect": "show what is in a bundle or a picture",
    "samplers": "list the samplers",
    "doctor": "show which backends work here, and what to install for the others",
    "cache": "list or remove compiled engines",
}
"""The subcommands: each is the module `allaprima.cli.<name>`."""

_SUCCESS, _REFUSED, _INTERRUPTED = 0, 2, 130


class Command(Protocol):
    """What the module of a subcommand offers."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""

    def run(self, options: argparse.Namespace) -> int | None:
        """Do it; None is the exit code 0. Raises AllaprimaError to refuse."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose refusals are RequestErrors, one line like all others."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise RequestError(f"{message} (see: {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 or the command's own, 2 for a refusal, 130 for Ctrl-C.

    With ALLAPRIMA_DEBUG in the environment a refusal shows its traceback too.
    """
    try:
        code = _dispatch(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
        return code
    except AllaprimaError as error:
        if os.environ.get("ALLAPRIMA_DEBUG"):
            traceback.print_exc()
        print(f"allaprima: error: {error}", file=sys.stderr)
        return _REFUSED
    except KeyboardInterrupt:
        print("allaprima: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _SUCCESS


def _dispatch(arguments: list[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name not in COMMANDS:
        _parse_top(arguments or ["--help"])
        return _SUCCESS
    command = cast(Command, importlib.import_module(f"allaprima.cli.{name}"))
    parser = Parser(prog=f"allaprima {name}", description=_sentence(COMMANDS[name]))
    command.configure(parser)
    # Intermixed, so that options may stand between the bundle and the prompt.
    return command.run(parser.parse_intermixed_args(rest)) or _SUCCESS


def _parse_top(arguments: list[str]) -> None:
    width = max(map(len, COMMANDS))
    parser = Parser(
        prog="allaprima",
        usage="allaprima [--help] [--version] COMMAND ...",
        description="Text-to-image diffusion models: export once, build for the device, paint without torch.",
        epilog="commands:\n"
        + "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
        + "\n\n`allaprima COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"allaprima {VERSION}")
    parser.parse_known_args([word for word in arguments[:1] if word.startswith("-")])
    near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(COMMANDS)}"
    raise RequestError(f"unknown command '{arguments[0]}': {hint}")


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."
