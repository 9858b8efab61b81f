"""The step of Kandinsky 3: a UNet that is told a text with a mask, and how to pool it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from allaprima.export.denoiser import Denoiser

_MASKED = -10000.0
"""What is added to the scores of tokens that are not attended to, as the model was trained."""


class MaskedDenoiser(Denoiser):
    """diffusers' Kandinsky3UNet as one step, a `Denoiser` in all else.

    Beside the text's states [G*B,L,D] it is told

    - encoder_attention_mask [G*B,L]: 1 for tokens, 0 for padding, which no attention looks at; where all is
      0, attention looks at all of it alike
    - pooling_weights [G*B,L]: the attention that pools the text asks with the weighted sum of its tokens

    The reference asks with the mean of the L rows that the longest prompt of the batch needs, so that a
    picture depends on its neighbours. With weights of 1/n on the first n rows, the n that a prompt alone has,
    and a mask of zeros behind them, more rows change nothing.
    """

    def __init__(
        self, unet: torch.nn.Module, conditions: Sequence[str] = (), options: Sequence[str] = ()
    ) -> None:
        super().__init__(unet, conditions, options)
        diffusers_unet: Any = unet
        diffusers_unet.set_attn_processor(_attend)

    def _predict(
        self, sample: Tensor, timestep: Tensor, guidance: Tensor, states: Tensor, named: dict[str, Tensor]
    ) -> Tensor:
        branches, kind = guidance.shape[0], self.precision
        output: Any = self._run(
            sample.unsqueeze(0).expand(branches, -1, -1, -1, -1).flatten(0, 1).to(kind),
            timestep.unsqueeze(0).expand(branches, -1).flatten(),
            states.to(kind),
            ((1 - named["encoder_attention_mask"]) * _MASKED).unsqueeze(1).to(kind),
            named["pooling_weights"].unsqueeze(1),
        )
        made: Tensor = output.float().unflatten(0, guidance.shape)
        return made

    def _run(self, sample: Tensor, timestep: Tensor, states: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        """The UNet's forward, but for the query of the pooling; `mask` and `weights` are [N,1,L]."""
        unet: Any = self.unet
        embedded = unet.time_embedding(unet.time_proj(timestep).to(sample.dtype))
        text = unet.encoder_hid_proj(states)
        # A sum in float32, of which no more than the mean is rounded.
        query = torch.matmul(weights, text.float()).to(text.dtype)
        embedded = embedded + unet.add_time_condition.attention(query, text, mask)[:, 0]
        hidden = unet.conv_in(sample)
        skipped = []
        for block in unet.down_blocks:
            hidden = block(hidden, embedded, text, mask)
            skipped.append(hidden)
        for index, block in enumerate(unet.up_blocks):
            beside = skipped.pop()  # the last one is what comes from below by itself
            hidden = block(torch.cat([hidden, beside], dim=1) if index else hidden, embedded, text, mask)
        made: Tensor = unet.conv_out(unet.conv_act_out(unet.conv_norm_out(hidden)))
        return made


def _attend(
    attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """An attention of diffusers, its mask [N,1,L] repeated for every query: ONNX Runtime does not do it."""
    query, key, value = (
        project(states).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for project, states in (
            (attention.to_q, hidden_states),
            (attention.to_k, encoder_hidden_states),
            (attention.to_v, encoder_hidden_states),
        )
    )
    mask = None
    if attention_mask is not None:
        mask = attention_mask.unsqueeze(1).expand(-1, -1, query.shape[2], -1)
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    made: Tensor = attention.to_out[0](mixed.transpose(1, 2).flatten(2))
    return made
