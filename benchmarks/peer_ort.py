"""ONNX Runtime by itself as a contestant: plain graphs, and diffusers' pipeline around them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allaprima.benchmarks.contestants import Contestant, Field, Painted
from allaprima.benchmarks.peer_files import Shapes, prepared, require_checkpoint, require_packages
from allaprima.benchmarks.plan import Settings, Work
from allaprima.benchmarks.report import installed
from allaprima.bundle import BackendError

NAME = "ort"
PACKAGES = ("diffusers", "onnx", "onnxscript", "torch", "transformers")
"""What the graphs depend on, beside the checkpoint."""
REMEDY = "pip install 'allaprima[bench,export,ort]'"


def contestants(field: Field) -> list[Contestant]:
    """On the CPU in fp32, since in fp16 it is no faster there; on a GPU in fp16."""
    checkpoint = require_checkpoint(NAME, field)
    require_packages(NAME, ("onnxruntime", *PACKAGES), REMEDY)
    precision = "fp16" if field.gpu else "fp32"
    if field.gpu:
        _require_cuda()
    write = functools.partial(write_graphs, precision=precision)
    folder = prepared(f"{NAME}-{precision}", checkpoint, installed(PACKAGES), write)
    painter = functools.partial(OrtPainter, checkpoint, folder, field.gpu)
    return [Contestant(f"{NAME}-{precision}", precision, painter, gpu=field.gpu, checkpoint=checkpoint)]


def _require_cuda() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise BackendError(f"{NAME} on a GPU needs onnxruntime-gpu: pip install 'allaprima[ort-gpu]'")


def write_graphs(checkpoint: Path, folder: Path, *, precision: str) -> None:
    """Export text encoders, UNet and image decoder, each to `folder`/PART/model.onnx.

    Raises ExportError.
    """
    import torch

    from allaprima.benchmarks.plain_graphs import plain_plans
    from allaprima.export.graph import write_graph
    from allaprima.export.source import open_checkpoint

    opened = open_checkpoint(str(checkpoint))
    dtype = torch.float16 if precision == "fp16" else torch.float32
    for name, plan in plain_plans(opened, dtype).items():
        write_graph(plan(), folder / name / "model.onnx")


class OrtPainter:
    """See Painter: sessions for one shape at a time, which ONNX Runtime can then plan and fold for."""

    def __init__(
        self, checkpoint: Path, folder: Path, gpu: bool, settings: Settings, works: Sequence[Work]
    ) -> None:
        import torch

        # Torch only moves latents about; more threads of it would wait for work, spinning, on others' cores.
        torch.set_num_threads(1)
        self.settings, self._gpu = settings, gpu
        self._checkpoint, self._folder = checkpoint, folder
        self._shapes = Shapes(works)
        self._pipeline = self._open()

    def _open(self) -> Any:
        from allaprima.benchmarks.ort_modules import assemble
        from allaprima.benchmarks.peer_diffusers import configure, silence

        silence()

        branches = 2 if self.settings.guidance_scale > 1 else 1
        threads = self.settings.threads
        pipeline = assemble(
            self._checkpoint, self._folder, self._shapes.fixed, branches, threads, gpu=self._gpu
        )
        return configure(pipeline, self.settings.sampler)

    def paint(self, work: Work) -> Painted:
        """See Painter."""
        from allaprima.benchmarks.peer_diffusers import paint

        if self._shapes.changed(work):
            self._pipeline = None  # before another takes its place in memory
            self._pipeline = self._open()
        return paint(self._pipeline, self.settings, work)

    def host_memory(self) -> int | None:
        """See Painter: it paints in this process."""
        return None

    def close(self) -> None:
        """See Painter."""
        self._pipeline = None
