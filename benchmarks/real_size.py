"""What exporting a checkpoint, or compiling a bundle, costs: seconds and peak memory by stage.

```
python -m allaprima.benchmarks.real_size export build/benchmarks/sd15-random build/benchmarks/sd15-random-fp16
python -m allaprima.benchmarks.real_size build build/benchmarks/sd15-random-fp16 --backend tensorrt-rtx
```
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from allaprima.benchmarks.process import in_new_process, peak_memory
from allaprima.benchmarks.report import RESULTS, stamp, table, write_result
from allaprima.bundle import AllaprimaError, engines, open_bundle
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


def measure_export(checkpoint: Path, bundle: Path, threads: int, **options: Any) -> list[Cost]:
    """Export, and what each stage cost, the import of the libraries first. To be called in a new process.

    `options` are those of `export_checkpoint`.

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
        overwrite=True,
        progress=lambda progress: meter.enter(progress.stage),
        **options,
    )
    meter.enter("end")
    return meter.costs


def measure_build(
    bundle: Path,
    backend: str,
    sizes: str,
    batch: str,
    targets: tuple[str, ...],
    components: tuple[str, ...],
    cache: Path,
) -> list[Cost]:
    """Compile into an empty cache, and what each stage cost. To be called in a new process.

    `components` are those to compile; none is all.

    Raises:
        BackendError, BuildError, BundleError, RequestError: as `build_bundle`.
    """
    meter = Meter("import")
    from allaprima.engine import Options, build_bundle, parse_range, parse_sizes

    build_bundle(
        open_bundle(bundle),
        backend=backend,
        sizes=parse_sizes(sizes),
        batch=parse_range(batch),
        options=Options(targets),
        components=components,
        cache=cache,
        progress=lambda progress: meter.enter(progress.stage),
    )
    meter.enter("end")
    return meter.costs


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    command = f"python -m allaprima.benchmarks.real_size {shlex.join(arguments)}"
    try:
        print(options.measure(options, command))
    except AllaprimaError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allaprima.benchmarks.real_size",
        description="Seconds and peak memory of an export or of a build, by stage.",
    )
    commands = parser.add_subparsers(required=True, metavar="export|build")
    export = commands.add_parser("export", help="checkpoint to bundle")
    export.set_defaults(measure=_export)
    export.add_argument("checkpoint", type=Path)
    export.add_argument("bundle", type=Path, help="the bundle to write, or to replace")
    export.add_argument("--precision", default="fp16", choices=("fp16", "fp32", "bf16"))
    export.add_argument("--prior", help="of a Kandinsky decoder: the folder of its prior")
    export.add_argument("--text-encoder-weights", choices=("int8",), help="see: allaprima export --help")
    export.add_argument("--threads", type=int, default=read_machine().cores, help="for torch (all cores)")
    build = commands.add_parser("build", help="bundle to engines, in an empty cache")
    build.set_defaults(measure=_build)
    build.add_argument("bundle", type=Path)
    build.add_argument("--backend", default="tensorrt-rtx", choices=("tensorrt-rtx",))
    build.add_argument("--shapes", default="512x512", help="see: allaprima build --help (512x512)")
    build.add_argument("--batch", default="1", help="see: allaprima build --help (1)")
    build.add_argument("--target", default="8.9", help="see: allaprima build --help (8.9)")
    build.add_argument("--components", help="see: allaprima build --help (all)")
    for command in (export, build):
        command.add_argument("--results", type=Path, default=RESULTS, help="where results go")
    return parser


def _export(options: argparse.Namespace, command: str) -> str:
    what = {
        "precision": options.precision,
        "prior": options.prior,
        "text_encoder_weights": options.text_encoder_weights,
    }
    what = {option: value for option, value in what.items() if value is not None}
    costs = in_new_process(measure_export, options.checkpoint, options.bundle, options.threads, **what)
    model = options.checkpoint.resolve().name
    kind = "-".join(filter(None, (options.precision, options.text_encoder_weights)))
    text = options.text_encoder_weights and f", the text encoders' weights to {options.text_encoder_weights}"
    return _write(
        options.results,
        f"export-{model}-{kind}",
        f"{model} to {options.precision}{text or ''}.",
        stamp(command, model, options.threads) | what,
        costs,
    )


def _build(options: argparse.Namespace, command: str) -> str:
    model = options.bundle.resolve().name
    with tempfile.TemporaryDirectory(dir=options.bundle.parent) as cache:
        targets = tuple(options.target.split(","))
        costs = in_new_process(
            measure_build,
            options.bundle,
            options.backend,
            options.shapes,
            options.batch,
            targets,
            tuple(options.components.split(",")) if options.components else (),
            Path(cache),
        )
        sizes = {
            engine.key.component: engine.size for _, engine in engines(Path(cache)) if engine is not None
        }
    told = ", ".join(f"{name} {show_bytes(size)}" for name, size in sizes.items())
    what = {"backend": options.backend, "engines": sizes}
    return _write(
        options.results,
        f"build-{model}-{options.backend}",
        f"{model} to {options.backend}, {options.shapes}, batch {options.batch}, compute capability "
        f"{options.target}: {told}.",
        stamp(command, model, 1) | what,
        costs,
    )


def _write(folder: Path, name: str, title: str, about: dict[str, Any], costs: list[Cost]) -> str:
    total = Cost("total", sum(cost.seconds for cost in costs), costs[-1].memory)
    rows = [(cost.stage, f"{cost.seconds:.1f}", show_bytes(cost.memory)) for cost in (*costs, total)]
    lines = [title, "", *table(("stage", "seconds", "peak memory so far"), rows)]
    result = {**about, "total": asdict(total), "stages": [asdict(cost) for cost in costs]}
    return write_result(folder, name, result, lines)


if __name__ == "__main__":
    main()
