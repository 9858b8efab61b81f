"""The graphs that a peer runs: a checkpoint's networks as they are, without guidance, update or rounding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from allaprima.bundle import TensorSpec
from allaprima.export.graph import GraphPlan
from allaprima.export.source import Checkpoint

ADDED = ("text_embeds", "time_ids")
"""What SDXL's UNet takes more."""
TIMES = 6
"""Numbers in its time_ids."""


class PlainTextEncoder(torch.nn.Module):
    """input_ids int64 [B,L] to last_hidden_state [B,L,D].

    With `states` SDXL's: two tensors (text_embeds [B,D'] if the model has a projection, last_hidden_state,
    the pooled one if not), then the hidden states of the embeddings and all N layers, each [B,L,D]. OpenVINO
    GenAI finds the one that it takes by its place, N + 1.
    """

    def __init__(self, model: torch.nn.Module, *, states: bool) -> None:
        super().__init__()
        self.model, self.states = model, states

    def forward(self, input_ids: Tensor) -> Any:
        """No attention mask."""
        made = self.model(input_ids, output_hidden_states=self.states)
        if not self.states:
            return made.last_hidden_state
        projected = getattr(made, "text_embeds", None)
        last = made.last_hidden_state
        first = (last, made.pooler_output) if projected is None else (projected, last)
        return (*first, *made.hidden_states)


class PlainUNet(torch.nn.Module):
    """sample [B,C,H,W], timestep [1], encoder_hidden_states [B,L,D] (and SDXL's) to out_sample [B,C,H,W]."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Any:
        """One call; B counts the branches of guidance."""
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[
            0
        ]


class PlainDecoder(torch.nn.Module):
    """latent_sample [B,C,H,W], without the latent scaling, to sample [B,3,height,width] in [-1,1]."""

    def __init__(self, vae: torch.nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Any:
        """Decode."""
        return self.vae.decode(latent_sample, return_dict=False)[0]  # type: ignore[operator]


def plain_plans(checkpoint: Checkpoint, dtype: torch.dtype) -> Mapping[str, Callable[[], GraphPlan]]:
    """One late plan for each part, so that only one model is in memory at a time; tensors are of `dtype`.

    The decoder of an autoencoder that diffusers would widen is in fp32. Raises ExportError from a plan whose
    part cannot be loaded.
    """
    large = checkpoint.has("text_encoder_2")
    widened = large and checkpoint.config("vae").get("force_upcast", True)
    plans: dict[str, Callable[[], GraphPlan]] = {}
    for part in ("text_encoder", "text_encoder_2"):
        if checkpoint.has(part):
            plans[part] = functools.partial(_text_plan, checkpoint, part, dtype, large)
    plans["unet"] = functools.partial(_unet_plan, checkpoint, dtype)
    plans["vae_decoder"] = functools.partial(_decoder_plan, checkpoint, torch.float32 if widened else dtype)
    return plans


def _text_plan(checkpoint: Checkpoint, part: str, dtype: torch.dtype, large: bool) -> GraphPlan:
    config = checkpoint.config(part)
    length, states = config["max_position_embeddings"], config["num_hidden_layers"] + 1
    outputs = ["last_hidden_state"]
    if large:
        projected = checkpoint.kind(part).endswith("WithProjection")
        first = ["text_embeds", "last_hidden_state"] if projected else ["last_hidden_state", "pooler_output"]
        outputs = [*first, *(f"hidden_states.{index}" for index in range(states))]
    return GraphPlan(
        name=part,
        module=PlainTextEncoder(checkpoint.load(part, dtype), states=large),
        example={"input_ids": torch.full((2, length), config["eos_token_id"], dtype=torch.int64)},
        axes={"input_ids": {0: "B"}},
        inputs=(TensorSpec("input_ids", "int64", ("B", length)),),
        outputs=tuple(TensorSpec(name, "float32", ("B",)) for name in outputs),
    )


def _unet_plan(checkpoint: Checkpoint, dtype: torch.dtype) -> GraphPlan:
    config = checkpoint.config("unet")
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    channels, width = config["in_channels"], config["cross_attention_dim"]
    length = checkpoint.config("text_encoder")["max_position_embeddings"]
    height, wide = (factor * torch.export.Dim(axis, min=1, max=4096) for axis in ("h", "w"))
    example = {
        "sample": torch.randn(2, channels, 3 * factor, 5 * factor, dtype=dtype),
        "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.randn(2, length, width, dtype=dtype),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - TIMES * config["addition_time_embed_dim"]
        example |= {"text_embeds": torch.randn(2, pooled, dtype=dtype)}
        example |= {"time_ids": torch.randn(2, TIMES, dtype=dtype)}
    batched = {name: {0: "B"} for name in example if name != "timestep"}
    return GraphPlan(
        name="unet",
        module=PlainUNet(checkpoint.load("unet", dtype)),
        example=example,
        axes={**batched, "sample": {0: "B", 2: height, 3: wide}, "timestep": {}},
        inputs=tuple(TensorSpec(name, "float32", tuple(each.shape)) for name, each in example.items()),
        outputs=(TensorSpec("out_sample", "float32", ("B", channels, "H", "W")),),
    )


def _decoder_plan(checkpoint: Checkpoint, dtype: torch.dtype) -> GraphPlan:
    channels = checkpoint.config("vae")["latent_channels"]
    return GraphPlan(
        name="vae_decoder",
        module=PlainDecoder(checkpoint.load("vae", dtype)),
        example={"latent_sample": torch.randn(2, channels, 6, 10, dtype=dtype)},
        axes={"latent_sample": {0: "B", 2: "H", 3: "W"}},
        inputs=(TensorSpec("latent_sample", "float32", ("B", channels, "H", "W")),),
        outputs=(TensorSpec("sample", "float32", ("B", 3, "8*H", "8*W")),),
    )
