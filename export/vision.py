"""CLIP's image encoders in a bundle: how pictures are prepared for them, and one that makes embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allaprima.bundle import ExportError, TensorSpec
from allaprima.export.graph import GraphPlan
from allaprima.export.reason import reason
from allaprima.export.source import Checkpoint

PART = "image_encoder"
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_FILE = "preprocessor_config.json"


class VisionEncoder(torch.nn.Module):
    """CLIP's vision transformer: normalised pixel_values [B,3,S,S] to image_embeds [B,D], both float32."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """See the class."""
        embeds: Tensor = self.model(pixel_values.to(next(self.model.parameters()).dtype)).image_embeds
        return embeds.float()


def plan(checkpoint: Checkpoint, dtype: torch.dtype) -> GraphPlan:
    """Load the image encoder, ready to trace."""
    model: Any = checkpoint.load(PART, dtype)
    size, width = int(model.config.image_size), int(model.config.projection_dim)
    return GraphPlan(
        name=PART,
        module=VisionEncoder(model),
        example={"pixel_values": torch.randn(2, 3, size, size)},
        axes={"pixel_values": {0: "B"}},
        inputs=(TensorSpec("pixel_values", "float32", ("B", 3, size, size)),),
        outputs=(TensorSpec("image_embeds", "float32", ("B", width)),),
    )


def read_preparation(checkpoint: Checkpoint, part: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """How pictures are prepared for a vision transformer of this configuration: size, mean and std.

    `part` is the folder of its processor, whose statistics stand in for those of CLIP if it is there. Raises
    ExportError if that cannot be read.
    """
    prepared: dict[str, Any] = dict(_CLIP)
    if (checkpoint.place(part) / _FILE).is_file():
        prepared |= checkpoint.config(part, _FILE)
    return {
        "size": config.get("image_size", 224),
        "mean": prepared["image_mean"],
        "std": prepared["image_std"],
    }


def write_settings(checkpoint: Checkpoint, path: Path) -> None:
    """Write for the runtime how pictures are prepared. Raises ExportError."""
    settings = read_preparation(checkpoint, "image_processor", checkpoint.config(PART))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    except OSError as cause:
        raise ExportError(f"{path} cannot be written: {reason(cause)}") from cause
