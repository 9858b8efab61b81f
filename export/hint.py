"""A Kandinsky decoder that follows a depth map: its UNet, taken apart from the small network that reads it.

The hint is the same in every step, so what that network makes of it is a graph and an input of its own, not
computed again in each step for each guidance branch, at the full size of the picture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from allaprima.bundle import TensorSpec
from allaprima.export.graph import GraphPlan

PART = "hint_encoder"
EMBEDS = "hint_embeds"
KIND = "image_hint"
"""The UNet's addition_embed_type."""
CHANNELS, DOWNSCALE = 4, 8
"""What the network makes, whatever the UNet's configuration."""


class HintEncoder(torch.nn.Module):
    """hint [B,3,8*H,8*W] in [0,1] to hint_embeds [B,4,H,W], further channels of the sample, both float32."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.block: Any = unet.add_embedding.input_hint_block  # type: ignore[union-attr]

    def forward(self, hint: Tensor) -> Tensor:
        """See the class."""
        embeds: Tensor = self.block(hint.to(next(self.block.parameters()).dtype))
        return embeds.float()


class _ImageAlone(torch.nn.Module):
    """What the embedding of a timestep takes of image_embeds [B,D], without a hint."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.image_proj, self.image_norm = embedding.image_proj, embedding.image_norm

    def forward(self, image_embeds: Tensor) -> Tensor:
        made: Tensor = self.image_norm(self.image_proj(image_embeds))
        return made


def without_hint(unet: torch.nn.Module) -> torch.nn.Module:
    """The UNet, changed to take embedded hints as further channels of its sample."""
    changed: Any = unet
    changed.add_embedding = _ImageAlone(changed.add_embedding)
    changed.register_to_config(addition_embed_type="image")
    return unet


def plan(unet: torch.nn.Module) -> GraphPlan:
    """The plan of the encoder in a UNet that takes hints."""
    height, width = (DOWNSCALE * torch.export.Dim(axis, min=1, max=4096) for axis in ("h", "w"))
    return GraphPlan(
        name=PART,
        module=HintEncoder(unet),
        example={"hint": torch.rand(2, 3, 6 * DOWNSCALE, 10 * DOWNSCALE)},
        axes={"hint": {0: "B", 2: height, 3: width}},
        inputs=(TensorSpec("hint", "float32", ("B", 3, f"{DOWNSCALE}*H", f"{DOWNSCALE}*W")),),
        outputs=(TensorSpec(EMBEDS, "float32", ("B", CHANNELS, "H", "W")),),
    )
