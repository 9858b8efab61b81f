"""From the start of a process to its first picture on disk, and the memory that takes.

```
python -m allaprima.benchmarks.startup --model shapes
```
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from allaprima.benchmarks.checkpoints import SHAPES
from allaprima.benchmarks.compare import PROMPT, export_bundles
from allaprima.benchmarks.contestants import Model
from allaprima.benchmarks.process import in_new_process
from allaprima.benchmarks.report import RESULTS, stamp, table, write_result
from allaprima.bundle import RequestError, open_bundle
from allaprima.cli.machine import read_machine
from allaprima.cli.output import show_bytes
from allaprima.runtime.backends import backends, compiles

DIFFUSERS = """
import sys, torch, diffusers
pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
    sys.argv[1], dtype=getattr(torch, sys.argv[2]), local_files_only=True,
    safety_checker=None, requires_safety_checker=False)
pipeline(sys.argv[3], num_inference_steps=int(sys.argv[4]),
         generator=torch.Generator("cpu").manual_seed(7)).images[0].save(sys.argv[5])
"""


@dataclass
class Starter:
    """A command that paints one picture to the file that is its last argument, and what came of it."""

    name: str
    command: list[str]
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    error: str = ""

    def run(self, picture: Path, cache: Path) -> None:
        """Paint once in a new process; one that failed is not asked again."""
        if self.error:
            return
        environment = {**os.environ, "ALLAPRIMA_CACHE": str(cache)}
        started = time.perf_counter()
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                [*self.command, str(picture)], stdout=said, stderr=said, env=environment
            )
            _, status, usage = os.wait4(process.pid, 0)
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


def starters(model: Model, steps: int) -> list[Starter]:
    """Every backend that works here, and diffusers."""
    bundle = model.bundle("fp16")
    ours = [
        Starter(f"allaprima-{name}", _ours("generate", str(bundle), PROMPT, name, steps))
        for name in in_new_process(working)
    ]
    theirs = [
        Starter(
            f"diffusers-{label}",
            [sys.executable, "-c", DIFFUSERS, str(model.checkpoint), dtype, PROMPT, str(steps)],
        )
        for label, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
    ]
    return [*ours, *theirs]


def working() -> list[str]:
    """The backends that work here.

    To be asked in another process: the peak memory of a child, as the system counts it, begins with its
    parent's size.
    """
    return [info.name for info in backends() if info.available]


def _ours(verb: str, bundle: str, prompt: str, backend: str, steps: int) -> list[str]:
    options = ["--backend", backend, "--steps", str(steps), "--seed", "7", "--quiet", "-o"]
    return [sys.executable, "-m", "allaprima.cli", verb, bundle, prompt, *options]


def measure(found: Sequence[Starter], rounds: int, folder: Path, cache: Path) -> None:
    """All in turn, `rounds` times, after a first time that warms the cache of files and is not counted."""
    for number in range(rounds + 1):
        for starter in found:
            starter.run(folder / "picture.png", cache)
            if number == 0:
                starter.seconds.clear()
                starter.memory.clear()


def build_engines(found: Sequence[Starter], bundle: Path, cache: Path) -> None:
    """Fill the cache, so that what is measured is a warm start."""
    for starter in found:
        name = starter.name.removeprefix("allaprima-")
        if name != starter.name and compiles(name):
            in_new_process(_build, bundle, name, cache)


def _build(bundle: Path, backend: str, cache: Path) -> None:
    from allaprima.engine import build_bundle

    build_bundle(open_bundle(bundle), backend=backend, cache=cache)


def tabulate(found: Sequence[Starter]) -> list[str]:
    """The table of the report."""
    rows = []
    for starter in found:
        if not starter.seconds:
            rows.append([starter.name, starter.error or "not run", ""])
            continue
        low, middle, high = min(starter.seconds), statistics.median(starter.seconds), max(starter.seconds)
        peak = show_bytes(int(statistics.median(starter.memory)))
        rows.append([starter.name, f"{middle:.2f} ({low:.2f} – {high:.2f})", peak])
    return table(("contestant", "s to the first picture", "peak memory"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write `results/startup-NAME.*`."""
    parser = argparse.ArgumentParser(
        prog="python -m allaprima.benchmarks.startup", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    parser.add_argument("--model", required=True, metavar="shapes|DIR")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bundles", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.steps < 1:
        raise RequestError(f"{options.rounds} rounds of {options.steps} steps: needs at least 1 of each")
    model = Model(SHAPES if options.model == "shapes" else Path(options.model).resolve(), options.bundles)
    export_bundles(model, ["fp16"], lambda line: print(line, file=sys.stderr, flush=True))
    found = starters(model, options.steps)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "engines"
        build_engines(found, model.bundle("fp16"), cache)
        measure(found, options.rounds, Path(folder), cache)
    command = shlex.join(["python", "-m", "allaprima.benchmarks.startup", *(arguments or sys.argv[1:])])
    results = [
        {"name": each.name, "seconds": each.seconds, "memory": each.memory, "error": each.error}
        for each in found
    ]
    about = {**stamp(command, model.name, read_machine().cores), "contestants": results}
    introduction = (
        f"{model.name}, {options.steps} steps, engines built before, files in the page cache, median of "
        f"{options.rounds} (smallest – largest)."
    )
    lines = [introduction, "", *tabulate(found)]
    print(write_result(options.results, f"startup-{model.name}", about, lines))


if __name__ == "__main__":
    main()
