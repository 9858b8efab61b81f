"""Step caching: two further graphs of a denoiser, which split its UNet into a deep and a shallow part.

Between one denoising step and the next the deep features of a UNet change little (X. Ma et al., "DeepCache:
Accelerating Diffusion Models for Free", arXiv 2312.00858, section 3.2). So one graph takes a whole step and
hands out what the deep part made; the other takes that of an earlier step, and computes only the rest anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from allaprima.bundle import ExportError, TensorSpec
from allaprima.export.denoiser import Denoiser
from allaprima.export.graph import GraphPlan

DEEP, SHALLOW = "denoiser_deep", "denoiser_shallow"
"""The components."""
FEATURES = "deep_features"
"""What the first makes and the second takes, float32 [G*B,C,H,W]."""
_TEXT = ("encoder_hidden_states", "encoder_hidden_states_2")
"""What only attention takes."""
_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D")
_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D")
"""The outermost blocks that can be taken apart."""


def check_cut(unet: Mapping[str, Any], layers: int) -> None:
    """ExportError unless a UNet of this configuration can be cut after so many shallow layers."""
    kind = unet.get("_class_name")
    if kind != "UNet2DConditionModel":
        raise ExportError(f"the step cache needs a UNet2DConditionModel, the checkpoint has a {kind}")
    ends = (
        ("last up block", unet["up_block_types"][-1], _UP),
        ("first down block", unet["down_block_types"][0], _DOWN),
    )
    for which, block, known in ends:
        if block not in known:
            raise ExportError(
                f"the step cache cannot take apart the UNet's {which}, a {block}: "
                f"known are {', '.join(known)}"
            )
    count = unet["layers_per_block"]
    most = 1 + (count if isinstance(count, int) else count[0])
    if not 1 <= layers <= most:
        raise ExportError(
            f"the step cache cannot have {layers} shallow layers: the UNet's outermost level has {most}, "
            f"so choose from 1 (the fastest) to {most}"
        )


class Cut:
    """A UNet of diffusers, cut within its outermost level.

    Shallow are the last `layers` of the way up (each a ResNet, with attention where the level has it), the
    first convolution and what follows it on the way down as far as their skip connections come from there,
    and the last convolution. Parameters and their names stay as they are: only `forward` of the blocks is
    replaced, while `deep` or `shallow` is entered.
    """

    def __init__(self, unet: Any, layers: int) -> None:
        self._unet, self._layers = unet, layers
        self._first, self._last = unet.down_blocks[0], unet.up_blocks[-1]

    @property
    def channels(self) -> int:
        """C of the deep features: what enters the first shallow layer of the way up from below."""
        entered: int = self._last.resnets[-self._layers].in_channels
        skipped: int = self._unet.conv_in.out_channels
        return entered - skipped

    @property
    def attends(self) -> bool:
        """Whether the shallow part looks at the text."""
        way_down = getattr(self._first, "attentions", []) if self._layers > 1 else []
        return bool(len(getattr(self._last, "attentions", [])) or len(way_down))

    @contextmanager
    def deep(self) -> Iterator[list[Tensor]]:
        """While the UNet is called, keep its deep features: the list then has one element."""
        kept: list[Tensor] = []
        count = len(self._last.resnets)

        def up(
            hidden_states: Tensor, temb: Tensor, res_hidden_states_tuple: Sequence[Tensor], **others: Any
        ) -> Tensor:
            skips, states = list(res_hidden_states_tuple), others.get("encoder_hidden_states")
            cut = count - self._layers
            made = _ascend(self._last, range(cut), hidden_states, skips, temb, states)
            kept.append(made)
            return _ascend(self._last, range(cut, count), made, skips, temb, states)

        with _replaced({self._last: up}):
            yield kept

    @contextmanager
    def shallow(self, features: Tensor) -> Iterator[None]:
        """While the UNet is called, compute its shallow part with these features, of the UNet's dtype."""
        count = len(self._last.resnets)

        def up(
            hidden_states: Tensor, temb: Tensor, res_hidden_states_tuple: Sequence[Tensor], **others: Any
        ) -> Tensor:
            # The outermost come first; the last layer takes the very first.
            skips = list(res_hidden_states_tuple[: self._layers])
            states = others.get("encoder_hidden_states")
            return _ascend(self._last, range(count - self._layers, count), features, skips, temb, states)

        def down(
            hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            made = _descend(self._first, self._layers - 1, hidden_states, temb, encoder_hidden_states)
            # The UNet counts skip connections: those that nothing takes are there in number only.
            return hidden_states, (*made, *_skips(self._first, hidden_states)[len(made) :])

        parts: dict[Any, Callable[..., Any]] = {
            block: _passing(block) for block in self._unet.down_blocks[1:]
        }
        parts |= {
            block: _unchanged
            for block in (self._unet.mid_block, *self._unet.up_blocks[:-1])
            if block is not None
        }
        with _replaced({**parts, self._first: down, self._last: up}):
            yield


def _ascend(
    block: Any,
    layers: Sequence[int],
    hidden: Tensor,
    skips: list[Tensor],
    temb: Tensor,
    states: Tensor | None,
) -> Tensor:
    """Some layers of the last block of the way up, which take their skip connections from the list's end."""
    attentions = getattr(block, "attentions", [])
    for index in layers:
        hidden = block.resnets[index](torch.cat([hidden, skips.pop()], dim=1), temb)
        if len(attentions):
            hidden = attentions[index](hidden, encoder_hidden_states=states, return_dict=False)[0]
    return hidden


def _descend(
    block: Any, layers: int, hidden: Tensor, temb: Tensor, states: Tensor | None
) -> tuple[Tensor, ...]:
    """What each of the first layers of the first block of the way down makes."""
    attentions, made = getattr(block, "attentions", []), []
    for index in range(layers):
        hidden = block.resnets[index](hidden, temb)
        if len(attentions):
            hidden = attentions[index](hidden, encoder_hidden_states=states, return_dict=False)[0]
        made.append(hidden)
    return tuple(made)


def _skips(block: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """As many tensors as a block of the way down has skip connections."""
    return (hidden,) * (len(block.resnets) + len(block.downsamplers or ()))


def _passing(block: Any) -> Callable[..., tuple[Tensor, tuple[Tensor, ...]]]:
    """In place of a block of the way down that is not computed."""
    return lambda hidden_states, *_, **__: (hidden_states, _skips(block, hidden_states))


def _unchanged(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """In place of a block of the way up that is not computed."""
    return hidden_states


@contextmanager
def _replaced(parts: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Other forwards for some modules. Within, others may replace them once more, and take theirs away."""
    for module, method in parts.items():
        module.forward = method
    try:
        yield
    finally:
        for module in parts:
            vars(module).pop("forward", None)  # its class has its own


class DeepStep(torch.nn.Module):
    """A whole step that also hands out the deep features of its UNet."""

    def __init__(self, step: Denoiser, cut: Cut) -> None:
        super().__init__()
        self.unet = step.unet
        self._step, self._cut = step.forward, cut  # a method, so that the weights keep their names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the step makes of its inputs, then the deep features."""
        with self._cut.deep() as features:
            next_sample, next_history = self._step(*inputs)
        return next_sample, next_history, features[0].float()


class ShallowStep(torch.nn.Module):
    """A step whose UNet takes its deep features from the last input, and `absent` inputs not at all.

    Those are told by their places among the inputs of the whole step.
    """

    def __init__(self, step: Denoiser, cut: Cut, absent: Sequence[int]) -> None:
        super().__init__()
        self.unet = step.unet
        self._step, self._cut, self._absent = step.forward, cut, sorted(absent)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What the step makes of its inputs and of deep features."""
        *given, features = inputs
        for place in self._absent:
            given.insert(place, features.new_zeros(1))  # nothing looks at it
        with self._cut.shallow(features.to(next(self.unet.parameters()).dtype)):
            return self._step(*given)


def plan_deep(plan: GraphPlan, layers: int) -> GraphPlan:
    """From the plan of a denoiser that of the graph which takes a whole step, and hands out deep features.

    `layers`: see `Cut`.
    """
    step = _step_of(plan)
    cut = Cut(step.unet, layers)
    outputs = (*plan.outputs, _features(plan, cut))
    return replace(plan, name=DEEP, module=DeepStep(step, cut), outputs=outputs, shares=plan.name)


def plan_shallow(plan: GraphPlan, layers: int) -> GraphPlan:
    """Likewise that of the graph which takes a step with deep features of another."""
    step = _step_of(plan)
    cut = Cut(step.unet, layers)
    names = list(plan.example)
    absent = [] if cut.attends else [name for name in names if name in _TEXT]
    spec, sample = _features(plan, cut), plan.axes["sample"]
    sizes = dict(zip(("G", "B"), plan.example["guidance"].shape, strict=True))
    sizes |= dict(zip(("H", "W"), plan.example["sample"].shape[2:], strict=True))
    kept = [name for name in names if name not in absent]
    return replace(
        plan,
        name=SHALLOW,
        module=ShallowStep(step, cut, [names.index(name) for name in absent]),
        example={name: plan.example[name] for name in kept} | {FEATURES: torch.randn(spec.resolve(sizes))},
        axes={name: plan.axes[name] for name in kept} | {FEATURES: {**sample, 0: "GB"}},
        inputs=(*(each for each in plan.inputs if each.name in kept), spec),
        shares=plan.name,
    )


def _step_of(plan: GraphPlan) -> Denoiser:
    assert isinstance(plan.module, Denoiser)
    return plan.module


def _features(plan: GraphPlan, cut: Cut) -> TensorSpec:
    return TensorSpec(FEATURES, "float32", ("G*B", cut.channels, "H", "W"))
