"""T5's encoder as the graph of a text encoder: Kandinsky 3 has that of Flan-UL2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from allaprima.bundle import TensorSpec, TokenizerSpec
from allaprima.export.graph import GraphPlan
from allaprima.export.source import Checkpoint


class T5Encoder(torch.nn.Module):
    """T5's encoder (Raffel et al. 2020, arXiv:1910.10683) over transformers' modules.

    input_ids int64 [B,T] and attention_mask float32 [B,T], 1 or 0, to last_hidden_state float32 [B,T,D], with
    zeros where the mask has them. The matrix products are computed in the weights' dtype. What is between
    them is float32: in a trained encoder the sum of the layers' outputs passes the largest number of fp16.
    """

    buckets: Tensor

    def __init__(self, model: torch.nn.Module, length: int) -> None:
        """`model` is transformers' T5EncoderModel, `length` is T."""
        super().__init__()
        self.model = model
        config: Any = model.config
        buckets = position_buckets(
            length, config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        self.register_buffer("buckets", buckets, persistent=False)
        self.lowest = torch.finfo(next(model.parameters()).dtype).min

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode; every layer has the same position bias, whose table is the first one's."""
        encoder: Any = self.model.encoder
        attention = encoder.block[0].layer[0].SelfAttention
        dtype = attention.q.weight.dtype
        table = attention.relative_attention_bias.weight.float()
        bias = embedding(self.buckets, table).permute(2, 0, 1)
        bias = (bias + (1 - attention_mask)[:, None, None, :] * self.lowest).to(dtype)
        hidden = encoder.embed_tokens(input_ids).float()
        for block in encoder.block:
            attend, feed = block.layer[0], block.layer[-1]
            normed = _normalize(attend.layer_norm, hidden).to(dtype)
            hidden = hidden + _attend(attend.SelfAttention, normed, bias).float()
            normed = _normalize(feed.layer_norm, hidden).to(dtype)
            hidden = hidden + _feed_forward(feed.DenseReluDense, normed).float()
        return _normalize(encoder.final_layer_norm, hidden) * attention_mask[:, :, None]


def _normalize(norm: Any, hidden: Tensor) -> Tensor:
    """Divide by the root of the mean square, in float32."""
    size = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    normed: Tensor = hidden * size * norm.weight.float()
    return normed


def _attend(attention: Any, hidden: Tensor, bias: Tensor) -> Tensor:
    """T5 does not scale the scores."""
    query, key, value = (
        project(hidden).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
        for project in (attention.q, attention.k, attention.v)
    )
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
    made: Tensor = attention.o(mixed.transpose(1, 2).flatten(2))
    return made


def _feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    gated = hasattr(layer, "wi_0")
    inner = layer.act(layer.wi_0(hidden)) * layer.wi_1(hidden) if gated else layer.act(layer.wi(hidden))
    made: Tensor = layer.wo(inner.to(layer.wo.weight.dtype))
    return made


def position_buckets(length: int, buckets: int, farthest: int) -> Tensor:
    """The row of the bias table for each query and key: int64 [length,length].

    Half of the rows are for keys behind the query, half for those ahead. Half of each are for one distance,
    the others for ranges that grow as a geometric series up to `farthest`, the last for all beyond.
    """
    side = buckets // 2
    exact = side // 2
    position = torch.arange(length)
    offset = position[None, :] - position[:, None]
    distance = offset.abs()
    ratio = torch.log(distance.clamp(min=exact).float() / exact) / math.log(farthest / exact)
    far = (exact + (ratio * (side - exact)).long()).clamp(max=side - 1)
    return torch.where(distance < exact, distance, far) + side * (offset > 0)


def plan_t5(
    checkpoint: Checkpoint, part: str, tokenizer: TokenizerSpec, width: int, dtype: torch.dtype
) -> GraphPlan:
    """The text encoder's graph, for prompts of the tokenizer's length; its weights stay on disk.

    `width` is D. Raises ExportError, as `Checkpoint.load`.
    """
    length = tokenizer.length
    return GraphPlan(
        name="text_encoder",
        module=T5Encoder(checkpoint.load(part, dtype), length),
        example={
            "input_ids": torch.full((2, length), tokenizer.eos, dtype=torch.int64),
            "attention_mask": torch.ones(2, length),
        },
        axes={"input_ids": {0: "B"}, "attention_mask": {0: "B"}},
        inputs=(
            TensorSpec("input_ids", "int64", ("B", length)),
            TensorSpec("attention_mask", "float32", ("B", length)),
        ),
        outputs=(TensorSpec("last_hidden_state", "float32", ("B", length, width)),),
    )
