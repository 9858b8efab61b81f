"""What each component of a bundle really takes in memory, beside what the runtime reckons for it.

```
python -m allaprima.benchmarks.memory build/benchmarks/sd15-random-fp16 --backend openvino
```

Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from allaprima.benchmarks.process import in_new_process
from allaprima.benchmarks.report import RESULTS, stamp, table, write_result
from allaprima.bundle import AllaprimaError, open_bundle
from allaprima.cli.output import show_bytes
from allaprima.runtime.backends import choose
from allaprima.runtime.footprint import activations
from allaprima.runtime.memory import trim
from allaprima.runtime.opener import Opener


@dataclass(frozen=True)
class Use:
    """Bytes of a component: reckoned, and resident after two runs, of which `mapped` are files.

    `weights` and `activations` are the parts of what was reckoned; `left` stays when it was unloaded.
    `seconds` are for loading and the first run.
    """

    component: str
    weights: int
    activations: int
    resident: int
    mapped: int
    left: int
    seconds: float


def measure(folder: Path, role: str, backend: str, precision: str | None, size: tuple[int, int]) -> Use:
    """Load a component, run it for one picture of `size` with guidance, and let go of it.

    To be called in a new process. Raises BackendError or BundleError.
    """
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    opener = Opener(bundle, backend, precision=precision, threads=1, memory_limit=sys.maxsize)
    session, weights = opener.open(role), opener.weigh(role).weights
    width, height = size
    downscale = manifest.latent.downscale
    extents = {"B": 1, "G": 2, "H": height // downscale, "W": width // downscale, "L": manifest.length}
    extents |= {"height": height, "width": width} | ({"B": 2} if role.startswith("text") else {})
    specs = (*session.inputs.values(), *session.outputs.values())
    count = 2 if role == "denoiser" else 1  # as many bindings as a pipeline makes
    layout = {spec.name: (spec.resolve(extents), spec.dtype) for spec in specs}
    _warm_up(backend)
    before, started = _resident(), perf_counter()
    blocks = [session.memory.allocate(layout) for _ in range(count)]
    bindings = [session.bind(block.tensors) for block in blocks]
    for binding in bindings:
        binding.run()
    seconds = perf_counter() - started
    after = _resident()
    needs = sum(activations(block.tensors, session.precision) for block in blocks)
    del bindings, binding, blocks
    session.unload()
    gc.collect()
    trim()
    left = _resident()
    growth = [now - then for now, then in zip(after, before, strict=True)]
    return Use(role, weights, needs, sum(growth), growth[1], sum(left) - sum(before), seconds)


def _warm_up(backend: str) -> None:
    """Load the backend's libraries, which are no component's."""
    from allaprima.runtime import Pipeline

    with Pipeline.open("shapes", backend=backend, threads=1) as pipeline:
        pipeline.generate("a red circle", num_inference_steps=1, seed=0)


def _resident() -> tuple[int, int]:
    """Resident bytes of this process: its own, and of mapped files."""
    words = Path("/proc/self/status").read_text(encoding="ascii").split()
    anonymous, files = (int(words[words.index(name) + 1]) for name in ("RssAnon:", "RssFile:"))
    return anonymous * 1024, files * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m allaprima.benchmarks.memory", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--components", help="only these, with commas between them")
    parser.add_argument("--size", default="512x512", help="of the picture (512x512)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results go")
    options = parser.parse_args(arguments)
    width, height = map(int, options.size.split("x"))
    try:
        backend, bundle = choose(options.backend), open_bundle(options.bundle)
        uses = [
            in_new_process(measure, options.bundle, role, backend, options.precision, (width, height))
            for role in (options.components.split(",") if options.components else bundle.manifest.components)
        ]
    except AllaprimaError as error:
        parser.error(str(error))
    command = f"python -m allaprima.benchmarks.memory {shlex.join(arguments)}"
    print(_write(options, backend, command, uses))


def _write(options: argparse.Namespace, backend: str, command: str, uses: list[Use]) -> str:
    model = options.bundle.absolute().name
    precision = options.precision or "the precision that it takes by itself"
    title = f"{model} with {backend} in {precision}, one picture of {options.size} with guidance."
    columns = ["component", "reckoned", "resident", "of it mapped", "left after unload"]
    columns += ["seconds to load and run"]
    rows = [
        (
            use.component,
            f"{show_bytes(use.weights)} + {show_bytes(use.activations)}",
            show_bytes(use.resident),
            show_bytes(max(use.mapped, 0)),
            show_bytes(max(use.left, 0)),
            f"{use.seconds:.1f}",
        )
        for use in uses
    ]
    about = stamp(command, model, 1) | {"backend": backend, "precision": options.precision}
    result = {**about, "components": [asdict(use) for use in uses]}
    name = "-".join(["memory", model, backend, *([options.precision] if options.precision else [])])
    return write_result(options.results, name, result, [title, "", *table(columns, rows)])


if __name__ == "__main__":
    main()
