"""A contestant in an interpreter of its own: a library that cannot be installed beside ours."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from allaprima.benchmarks.contestants import Painted
from allaprima.benchmarks.peer_files import Shapes
from allaprima.benchmarks.plan import Settings, Work
from allaprima.bundle import BackendError

PROGRAM = Path(__file__).with_name("peer_program.py")
TRIAL_SECONDS = 120.0
Request = Mapping[str, Any]


def variable(peer: str) -> str:
    """The environment variable that names a peer's interpreter."""
    return f"ALLAPRIMA_PYTHON_{peer.upper().replace('-', '_')}"


def interpreter(peer: str, module: str, remedy: str, default: str | None = None) -> str:
    """The interpreter that has a peer, tried out.

    `default` is taken where the variable names none. Raises BackendError with the remedy if there is none, or
    if it cannot import `module`.
    """
    python = os.environ.get(variable(peer)) or default
    if not python:
        raise BackendError(f"{peer} has no interpreter: {remedy}")
    try:
        tried = subprocess.run(
            [python, "-c", f"import {module}"], capture_output=True, text=True, timeout=TRIAL_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"{peer} cannot be run by {python}: {error}") from error
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BackendError(f"{peer} is not usable in {python} ({last}): {remedy}")
    return python


VERSIONS = """
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def versions_there(peer: str, python: str, packages: Sequence[str]) -> dict[str, str]:
    """The versions of another interpreter and of those packages that it has. Raises BackendError."""
    command = [python, "-c", VERSIONS, *packages]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_SECONDS, check=True)
        found: dict[str, str] = json.loads(said.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise BackendError(f"{peer}: {python} does not tell its versions: {error}") from error
    return found


class Program:
    """The program of a peer, running.

    Its environment has no PYTHONPATH, which would bring packages of ours. Raises BackendError with what the
    library says if it does not start, or fails later.
    """

    def __init__(self, python: str, kind: str, options: Request) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._kind = kind
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the program
        self._process = subprocess.Popen(
            [python, os.fspath(PROGRAM), kind, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        try:
            self._answer()
        except BackendError:
            self.close()
            raise

    def ask(self, request: Request) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], int]:
        """The uint8 pictures [batch,height,width,3] of a request, and the program's peak memory in bytes."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # why it ended is said in its answer
            pass
        answer = self._answer()
        count = int(np.prod(answer["shape"]))
        pixels = self._output.read(count)
        return np.frombuffer(pixels, np.uint8).reshape(answer["shape"]), int(answer["memory"])

    @property
    def _output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _answer(self) -> Request:
        line = self._output.readline()
        answer: Request = json.loads(line) if line.strip() else {"error": self._last_words()}
        if "error" in answer:
            raise BackendError(f"{self._kind}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"it ended with {code}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


class ProgramPainter:
    """See Painter: paints by asking a program."""

    def __init__(self, program: Program, settings: Settings, works: Sequence[Work]) -> None:
        self.settings, self._program = settings, program
        self._shapes = Shapes(works)
        self._memory: int | None = None

    def paint(self, work: Work) -> Painted:
        """See Painter."""
        self._shapes.changed(work)
        pictures, self._memory = self._program.ask(self.request(work))
        return Painted([Image.fromarray(picture) for picture in pictures])

    def request(self, work: Work) -> dict[str, Any]:
        """What is asked for a work."""
        return {
            "prompt": self.settings.prompt,
            "seed": self.settings.seed,
            "batch": work.batch,
            "width": work.width,
            "height": work.height,
            "steps": work.steps,
            "fixed": self._shapes.fixed,
        }

    def host_memory(self) -> int | None:
        """See Painter: of the program."""
        return self._memory

    def close(self) -> None:
        """See Painter."""
        self._program.close()
