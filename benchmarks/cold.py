"""From the start of a process to its first picture on disk, and the memory that takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allaprima.benchmarks.contestants import Contestant
from allaprima.benchmarks.ours import ON_CPU, build_general
from allaprima.benchmarks.plan import Settings, Work
from allaprima.benchmarks.process import in_new_process

CACHED, UNCACHED, PLAIN = "engines cached", "no engines", ""
"""How a process starts; the last is for libraries that cache none."""


@dataclass
class Starter:
    """A command that paints one picture, and what came of it: seconds, and peak memory in bytes."""

    name: str
    kind: str
    command: Callable[[Path], list[str]]
    cache: Path | None = None
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    error: str = ""

    def run(self, picture: Path) -> None:
        """Paint once in a new process; one that failed is not asked again."""
        if self.error:
            return
        environment = dict(os.environ)
        if self.cache is not None:
            environment["ALLAPRIMA_CACHE"] = str(self.cache)
        started = time.perf_counter()
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(self.command(picture), stdout=said, stderr=said, env=environment)
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                process.wait()
                raise
            seconds = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode != 0 or not picture.exists():
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                self.error = lines[-1] if lines else f"exit status {process.returncode}"
                return
        picture.unlink()
        self.seconds.append(seconds)
        self.memory.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))

    def to_json(self) -> dict[str, Any]:
        """For the result."""
        known = {"seconds": self.seconds, "memory": self.memory} if not self.error else {"error": self.error}
        return {"contestant": self.name, "kind": self.kind, **known}


def starters(
    contestants: Sequence[Contestant], settings: Settings, work: Work, folder: Path
) -> list[Starter]:
    """Every contestant that has a command; our own twice, where engines can be cached.

    Engines are built now, in `folder`. In another process: the peak memory of a child, as the system counts
    it, begins with its parent's size.
    """
    found: list[Starter] = []
    for each in contestants:
        if each.first_picture is None or each.name.endswith("-fixed"):
            continue

        def command(picture: Path, contestant: Contestant = each) -> list[str]:
            assert contestant.first_picture is not None
            return contestant.first_picture(settings, work, picture)

        if not each.bundle:
            found.append(Starter(each.name, PLAIN, command))
        elif each.backend not in ON_CPU:
            found.append(Starter(each.name, CACHED, command))
        else:
            empty, full = folder / f"{each.name}-empty", folder / f"{each.name}-full"
            found.append(Starter(each.name, UNCACHED, command, empty))
            warm = Starter(each.name, CACHED, command, full)
            try:
                in_new_process(build_general, each.bundle, each.backend, each.precision, full)
            except Exception as error:  # the same that a user would be told
                warm.error = str(error)
            found.append(warm)
    return found


def measure(found: Sequence[Starter], rounds: int, picture: Path, told: Callable[[], None]) -> None:
    """All in turn, `rounds` times, after a first time that warms the cache of files and is not counted.

    `told` is called after every process.
    """
    for number in range(rounds + 1):
        for starter in found:
            starter.run(picture)
            if number == 0:
                starter.seconds.clear()
                starter.memory.clear()
            told()
