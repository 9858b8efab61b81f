"""optimum's pipelines as contestants: on ONNX Runtime (optimum-onnx) and on OpenVINO (optimum-intel)."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from allaprima.benchmarks.compatible import write_compatible
from allaprima.benchmarks.contestants import Contestant, Field
from allaprima.benchmarks.peer_files import prepared, require_checkpoint
from allaprima.benchmarks.peer_worker import Program, ProgramPainter, interpreter, variable, versions_there
from allaprima.benchmarks.plan import Settings, Work
from allaprima.bundle import BackendError

PACKAGES = (
    *("optimum", "optimum-onnx", "optimum-intel", "onnxruntime", "openvino", "diffusers", "numpy", "torch"),
    "transformers",
)
"""What its files and its pictures depend on."""


def onnx(field: Field) -> list[Contestant]:
    """On ONNX Runtime in fp32."""
    return _contestants(
        field, "optimum-onnx", "optimum.onnxruntime", ("fp32",), "'optimum-onnx[onnxruntime]'"
    )


def intel(field: Field) -> list[Contestant]:
    """On OpenVINO, in bf16 where the processor has it, and in fp32."""
    from allaprima.benchmarks.peer_openvino_genai import precisions

    return _contestants(field, "optimum-intel", "optimum.intel", precisions(), "'optimum-intel[openvino]'")


def _contestants(
    field: Field, name: str, module: str, precisions: Sequence[str], package: str
) -> list[Contestant]:
    checkpoint = require_checkpoint(name, field)
    if field.gpu:
        raise BackendError(f"{name} is compared on the CPU alone")
    python = interpreter(
        name,
        module,
        "it needs an older transformers than ours, so make an environment of its own with "
        f"pip install {package} diffusers, and name its interpreter by --peer-python {name}=PYTHON or the "
        f"variable {variable(name)}",
    )
    versions = versions_there(name, python, PACKAGES)
    folder = prepared(name, checkpoint, versions, functools.partial(_export, python, name))
    return [
        Contestant(
            f"{name}-{each}",
            each,
            functools.partial(_open, python, name, folder, each),
            checkpoint=checkpoint,
            versions=versions,
        )
        for each in precisions
    ]


def _export(python: str, name: str, checkpoint: Path, folder: Path) -> None:
    """The peer's own export of the checkpoint."""
    compatible = folder / "compatible"
    compatible.mkdir()
    write_compatible(checkpoint, compatible)
    Program(python, name, {"export": str(compatible), "folder": str(folder)}).close()


def _open(
    python: str, name: str, folder: Path, precision: str, settings: Settings, works: Sequence[Work]
) -> ProgramPainter:
    from allaprima.runtime.samplers.catalog import find

    sampler = None if settings.sampler is None else find(settings.sampler)
    unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    options = {
        "folder": str(folder),
        "threads": settings.threads,
        "precision": precision,
        "guidance_scale": settings.guidance_scale,
        "channels": unet["in_channels"],
        "scheduler": None if sampler is None else sampler.scheduler,
        "overrides": {} if sampler is None else dict(sampler.overrides),
    }
    return ProgramPainter(Program(python, name, options), settings, works)
