"""What exporting a checkpoint costs: seconds and peak memory by stage.

```
python -m allaprima.benchmarks.export_real_size build/benchmarks/sd15-random build/benchmarks/sd15-random-fp16
```
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from allaprima.benchmarks.process import in_new_process, peak_memory
from allaprima.benchmarks.report import RESULTS, stamp, table, write_result
from allaprima.bundle import AllaprimaError
from allaprima.cli.machine import read_machine
from allaprima.cli.output import show_bytes


@dataclass(frozen=True)
class Cost:
    """One stage: its seconds, and the peak of the process's memory up to its end, in bytes."""

    stage: str
    seconds: float
    memory: int


class Meter:
    """Closes a stage when the next one begins."""

    def __init__(self, stage: str) -> None:
        self.costs: list[Cost] = []
        self._stage, self._started = stage, perf_counter()

    def enter(self, stage: str) -> None:
        """Begin a stage, which ends the one before."""
        now = perf_counter()
        self.costs.append(Cost(self._stage, now - self._started, peak_memory()))
        self._stage, self._started = stage, now


def measure_export(checkpoint: Path, bundle: Path, precision: str, threads: int) -> list[Cost]:
    """Export, and what each stage cost, the import of the libraries first. To be called in a new process.

    Raises:
        ExportError, BundleError: as `export_checkpoint`.
    """
    meter = Meter("import")
    import torch

    from allaprima.export import export_checkpoint

    torch.set_num_threads(threads)
    export_checkpoint(
        str(checkpoint),
        bundle,
        precision=precision,
        overwrite=True,
        progress=lambda progress: meter.enter(progress.stage),
    )
    meter.enter("end")
    return meter.costs


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m allaprima.benchmarks.export_real_size",
        description="Seconds and peak memory of an export, by stage.",
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path, help="the bundle to write, or to replace")
    parser.add_argument("--precision", default="fp16", choices=("fp16", "fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=read_machine().cores, help="for torch (all cores)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results go")
    options = parser.parse_args(arguments)
    command = f"python -m allaprima.benchmarks.export_real_size {shlex.join(arguments)}"
    try:
        print(_measure(options, command))
    except AllaprimaError as error:
        parser.error(str(error))


def _measure(options: argparse.Namespace, command: str) -> str:
    costs = in_new_process(
        measure_export, options.checkpoint, options.bundle, options.precision, options.threads
    )
    model = options.checkpoint.resolve().name
    total = Cost("total", sum(cost.seconds for cost in costs), costs[-1].memory)
    rows = [(cost.stage, f"{cost.seconds:.1f}", show_bytes(cost.memory)) for cost in (*costs, total)]
    lines = [f"{model} to {options.precision}.", "", *table(("stage", "seconds", "peak memory so far"), rows)]
    result = {
        **stamp(command, model, options.threads),
        "precision": options.precision,
        "total": asdict(total),
        "stages": [asdict(cost) for cost in costs],
    }
    return write_result(options.results, f"export-{model}-{options.precision}", result, lines)


if __name__ == "__main__":
    main()
