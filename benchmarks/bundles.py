"""Bundles of a checkpoint in several precisions, exported when they are missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from allaprima.benchmarks.process import in_new_process


@dataclass(frozen=True)
class Model:
    """A diffusers folder, and the folder where its bundles lie; `step_cache` as of `export_checkpoint`."""

    checkpoint: Path
    bundles: Path
    step_cache: int = 0

    @property
    def name(self) -> str:
        """What results are called after."""
        return self.checkpoint.parent.name if self.checkpoint.name == "checkpoint" else self.checkpoint.name

    def bundle(self, precision: str) -> Path:
        """The folder of the bundle whose weights have this precision."""
        cached = f"-step-cache-{self.step_cache}" if self.step_cache else ""
        return self.bundles / f"{self.name}-{precision}{cached}"


def export_bundles(model: Model, precisions: Sequence[str], tell: Callable[[str], None]) -> None:
    """Make the bundles that are missing, or older than the checkpoint or the exporter.

    Raises:
        ExportError: the checkpoint cannot be exported.
    """
    exporter = Path(__file__).resolve().parents[1] / "export"
    inputs = [*model.checkpoint.rglob("*"), *exporter.rglob("*.py")]
    for precision in precisions:
        made = model.bundle(precision) / "bundle.json"
        if not made.is_file() or any(each.stat().st_mtime > made.stat().st_mtime for each in inputs):
            tell(f"exporting {model.name} in {precision}")
            in_new_process(_export, model, precision)


def _export(model: Model, precision: str) -> None:
    from allaprima.export import export_checkpoint

    export_checkpoint(
        str(model.checkpoint),
        model.bundle(precision),
        precision=precision,
        overwrite=True,
        step_cache=model.step_cache,
    )
