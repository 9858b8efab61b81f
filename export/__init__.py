"""Export: the only home of torch, diffusers and transformers. A checkpoint goes in, a bundle comes out."""

from allaprima.export.checkpoint import Progress, export_checkpoint
from allaprima.export.presets import PRESETS, Usage
from allaprima.export.single_file import SingleFile

__all__ = ["PRESETS", "Progress", "SingleFile", "Usage", "export_checkpoint"]
