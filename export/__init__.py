"""Export: the only home of torch, diffusers and transformers. A checkpoint goes in, a bundle comes out."""

from allaprima.export.checkpoint import Progress, export_checkpoint

__all__ = ["Progress", "export_checkpoint"]
