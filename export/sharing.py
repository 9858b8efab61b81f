"""Guidance branches, computed once for all as long as they are the same.

Up to the first attention to the text every branch of a UNet has the same values, since sample and timestep
are the same. The libraries compute them for each branch; here they are computed for one, and repeated where
the text comes in. No value changes by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

_PLAIN = {"norm_type": "layer_norm", "pos_embed": None, "only_cross_attention": False}
"""What a transformer's block must be, to be taken apart here."""


class Sharing:
    """What the first layers of a UNet of diffusers compute, once for all branches of guidance.

    For UNets whose time embedding is of nothing but the timestep, and whose blocks up to the first attention
    are plain; `applies` says whether. Parameters and their names stay as they are: only `forward` of the
    first layers is replaced, while `within` is entered.
    """

    def __init__(self, unet: torch.nn.Module) -> None:
        self._unet: Any = unet
        self._before: list[Any] = []
        self._first: Any = None
        for block in getattr(unet, "down_blocks", ()):
            if type(block).__name__ == "CrossAttnDownBlock2D":
                self._first = block
                break
            if type(block).__name__ != "DownBlock2D":
                break
            self._before.append(block)
        self._shape: tuple[int, int] = (1, 1)
        self._single: Tensor | None = None

    @property
    def applies(self) -> bool:
        """Whether this UNet can be shared so."""
        config = getattr(self._unet, "config", {})
        extra = ("class_embed_type", "addition_embed_type", "num_class_embeds", "time_cond_proj_dim")
        if self._first is None or any(config.get(name) is not None for name in extra):
            return False
        transformer = self._first.attentions[0]
        block = getattr(transformer, "transformer_blocks", [None])[0]
        return (
            type(transformer).__name__ == "Transformer2DModel"
            and transformer.is_input_continuous
            and type(block).__name__ == "BasicTransformerBlock"
            and block.attn2 is not None
            and block.attn2.is_cross_attention
            and not hasattr(block, "fuser")
            and all(getattr(block, name) == value for name, value in _PLAIN.items())
        )

    @contextmanager
    def within(self, branches: int, samples: int) -> Iterator[None]:
        """Share while the UNet is called with `branches` times the same `samples`, branch-major."""
        self._shape = branches, samples
        first = self._first
        parts: dict[Any, Callable[..., Any]] = {self._unet.conv_in: self._enter}
        parts |= dict.fromkeys(self._before, self._pass)
        parts |= {first.resnets[0]: self._leave, first.attentions[0]: self._attend}
        for module, method in parts.items():
            module.forward = partial(method, module.forward)
        try:
            yield
        finally:
            for module in parts:
                del module.forward  # its class has its own
            self._single = None

    def _one(self, values: Tensor) -> Tensor:
        """The first branch [B,...] of [G*B,...]."""
        branches: Tensor = values.unflatten(0, self._shape)  # type: ignore[no-untyped-call]
        return branches[0]

    def _all(self, values: Tensor) -> Tensor:
        """[B,...] for every branch, [G*B,...]."""
        return values.unsqueeze(0).expand(self._shape[0], *(-1,) * values.ndim).flatten(0, 1)

    def _enter(self, forward: Callable[..., Tensor], sample: Tensor) -> Tensor:
        """The first convolution; what it makes is a skip connection too, which needs all branches."""
        self._single = forward(self._one(sample))
        return self._all(self._single)

    def _pass(
        self, forward: Callable[..., Any], hidden_states: Tensor, temb: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A block without attention."""
        made, states = forward(hidden_states=self._single, temb=self._one(temb))
        self._single = made
        return made, tuple(self._all(each) for each in states)

    def _leave(self, forward: Callable[..., Tensor], hidden_states: Tensor, temb: Tensor) -> Tensor:
        """The last layer before the first attention, which takes what is the same for all branches."""
        assert self._single is not None
        return forward(self._single, self._one(temb))

    def _attend(
        self, _: Callable[..., Any], hidden_states: Tensor, encoder_hidden_states: Tensor, **options: Any
    ) -> tuple[Tensor]:
        """The first transformer: the branches part between the attention to itself and that to the text."""
        transformer = self._first.attentions[0]
        first, *others = transformer.transformer_blocks
        height, width = hidden_states.shape[2:]
        states = _to_tokens(transformer, transformer.norm(hidden_states))
        states = self._all(first.attn1(first.norm1(states)) + states)
        states = first.attn2(first.norm2(states), encoder_hidden_states=encoder_hidden_states) + states
        states = first.ff(first.norm3(states)) + states
        for block in others:
            states = block(states, encoder_hidden_states=encoder_hidden_states)
        return (_to_picture(transformer, states, height, width) + self._all(hidden_states),)


def _to_tokens(transformer: Any, states: Tensor) -> Tensor:
    """[B,C,H,W] to projected tokens [B,H*W,C']."""
    if transformer.use_linear_projection:
        projected: Tensor = transformer.proj_in(states.flatten(2).transpose(1, 2))
        return projected
    projected = transformer.proj_in(states)
    return projected.flatten(2).transpose(1, 2)


def _to_picture(transformer: Any, states: Tensor, height: int, width: int) -> Tensor:
    """Tokens [B,H*W,C'] back to [B,C,H,W]."""
    if transformer.use_linear_projection:
        states = transformer.proj_out(states)
    picture: Tensor = states.transpose(1, 2).unflatten(2, (height, width))  # type: ignore[no-untyped-call]
    made: Tensor = picture if transformer.use_linear_projection else transformer.proj_out(picture)
    return made
