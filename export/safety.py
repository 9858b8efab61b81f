"""The safety checker of a checkpoint: its graph, and what the runtime needs beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from allaprima.bundle import ExportError, TensorSpec
from allaprima.export.graph import GraphPlan
from allaprima.export.reason import reason
from allaprima.export.source import Checkpoint
from allaprima.export.vision import read_preparation

PART = "safety_checker"


class SafetyChecker(torch.nn.Module):
    """clip_input float32 [B,3,S,S] to its cosines with the special concepts [B,s] and with the others [B,c].

    The image encoder computes in its own precision; projection, norms and cosines are float32, since
    decisions hang on their third decimal.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        projection: Any = model.visual_projection
        projection.float()
        self.special = torch.nn.Parameter(_unit(model.special_care_embeds), requires_grad=False)
        self.concepts = torch.nn.Parameter(_unit(model.concept_embeds), requires_grad=False)

    def forward(self, clip_input: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        model: Any = self.model
        dtype = next(model.vision_model.parameters()).dtype
        pooled = model.vision_model(clip_input.to(dtype))[1]
        image = functional.normalize(model.visual_projection(pooled.float()))
        return image @ self.special.T, image @ self.concepts.T


def _unit(embeds: Any) -> Tensor:
    unit: Tensor = functional.normalize(embeds.detach().float())
    return unit


def has_safety_checker(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint names one, and has its weights."""
    entry = checkpoint.index.get(PART)
    named = isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    return named and (checkpoint.folder / PART).is_dir()


def plan(checkpoint: Checkpoint, dtype: torch.dtype) -> GraphPlan:
    """Load the safety checker, ready to trace."""
    model: Any = checkpoint.load(PART, dtype)
    size = int(model.config.vision_config.image_size)
    module = SafetyChecker(model)
    counts = {"special": len(module.special), "concepts": len(module.concepts)}
    return GraphPlan(
        name=PART,
        module=module,
        example={"clip_input": torch.randn(2, 3, size, size)},
        axes={"clip_input": {0: "B"}},
        inputs=(TensorSpec("clip_input", "float32", ("B", 3, size, size)),),
        outputs=tuple(TensorSpec(name, "float32", ("B", count)) for name, count in counts.items()),
    )


def write_settings(checkpoint: Checkpoint, path: Path) -> None:
    """Write thresholds, size and normalisation for the runtime. Raises ExportError."""
    from safetensors import safe_open

    config = checkpoint.config(PART)
    thresholds: dict[str, list[float]] = {}
    try:
        for file in sorted((checkpoint.folder / PART).glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if name.endswith("_embeds_weights"):
                        thresholds[name] = tensors.get_tensor(name).float().tolist()
        settings = {
            **read_preparation(checkpoint, "feature_extractor", config.get("vision_config", {})),
            "special": thresholds["special_care_embeds_weights"],
            "concepts": thresholds["concept_embeds_weights"],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    except Exception as cause:
        raise ExportError(
            f"the safety checker in '{checkpoint.folder}' is not usable: {reason(cause)}"
        ) from cause
