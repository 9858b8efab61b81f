"""The denoiser graph: one whole denoising step for a batch, guidance and sampler update included."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor

from allaprima.export.sharing import Sharing
from allaprima.export.update import VARIANCE, advance, per_sample

ADDED = ("text_embeds", "time_ids")
"""Conditions that are embedded with the timestep."""


class Denoiser(torch.nn.Module):
    """A UNet wrapped into one step of any linear sampler (see `allaprima.runtime.samplers.Table`).

    The UNet runs in its own precision, everything around it in float32. B samples, G guidance branches,
    S history slots, C channels, H × W latent size, L text tokens of width D. `conditions` names what it takes
    beyond the first text encoder's states, in the order of the graph's inputs, with diffusers' names:

    - encoder_hidden_states_2 [G*B,L,D2]: states of a second text encoder, set beside those of the first
    - text_embeds [G*B,D3]: a text's pooled vector
    - time_ids [G*B,N]: sizes and crops as numbers, of which sinusoids are made in float32
    - timestep_cond [G*B,D4]: an embedding of the guidance scale, for models that were distilled with it
    - mask [B,1,H,W], masked_image_latents [B,C,H,W]: for models of inpainting

    `options` likewise names inputs that come after those:

    - thresholds [B,2]: ratio and most of dynamic thresholding, in place of the clamp unless ratio is negative
    - from_limited [B,2]: r and s of prediction = r*sample + s*limited, where limited is what is left of raw
    - learned_variance [B,2]: d and e, if the UNet makes 2C channels. The last C of them, v, tell the variance
      of the noise, which counts u2*exp(d*v) + e*sqrt(v). With guidance v is that of the last branch or, as
      pipelines differ, with `guided_variance` that of all branches together.
    """

    channels: ClassVar[tuple[str, ...]] = ("mask", "masked_image_latents")
    """Conditions that are further channels of the sample, in this order."""

    def __init__(
        self,
        unet: torch.nn.Module,
        conditions: Sequence[str] = (),
        options: Sequence[str] = (),
        *,
        guided_variance: bool = False,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.sharing = Sharing(unet)
        self.conditions = tuple(conditions)
        self.options = tuple(options)
        self.guided_variance = guided_variance

    def forward(
        self,
        sample: Tensor,
        history: Tensor,
        noise: Tensor,
        timestep: Tensor,
        input_scale: Tensor,
        guidance: Tensor,
        to_prediction: Tensor,
        bounds: Tensor,
        update: Tensor,
        encoder_hidden_states: Tensor,
        guidance_rescale: Tensor,
        *conditions: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            sample: current latents in the sampler's own space, [B,C,H,W].
            history: earlier predictions, newest first, [S,B,C,H,W].
            noise: this step's noise, zeros where the sampler draws none, [B,C,H,W].
            timestep: [B], may be fractional.
            input_scale: c_in, [B].
            guidance: weight of each branch, [G,B]; classifier-free guidance with scale s has the rows 1-s
                and s.
            to_prediction: p and q of raw = p*sample + q*output, [B,2].
            bounds: the prediction is raw, clamped to ±bounds, [B]; 3e38 leaves it alone.
            update: [B,4+S], next = u0*sample + u1*prediction + u2*noise + sum_k u(3+k)*history_k +
                u(3+S)*raw.
            encoder_hidden_states: conditions, branch-major, [G*B,L,D].
            guidance_rescale: share phi of the guided output that is rescaled to the standard deviation of the
                last branch's, [B]; up to 0 leaves it alone.
            conditions: those that were named, then the options.

        Returns:
            next_sample [B,C,H,W] and next_history [S,B,C,H,W], the new prediction in front.
        """
        named = dict(zip((*self.conditions, *self.options), conditions, strict=True))
        scaled = sample * per_sample(input_scale)
        widened = torch.cat([scaled, *(named[name] for name in self.channels if name in named)], dim=1)
        outputs = self._predict(widened, timestep, guidance, encoder_hidden_states, named)
        guided, variance = self._guide(outputs, guidance, guidance_rescale, sample.shape[1])
        row = {"to_prediction": to_prediction, "bounds": bounds, "update": update}
        row |= {name: named[name] for name in self.options}
        return advance(sample, history, noise, guided, variance, row)

    def _guide(
        self, outputs: Tensor, guidance: Tensor, share: Tensor, channels: int
    ) -> tuple[Tensor, Tensor | None]:
        """The output [B,C,H,W] of all branches together, and the variance that goes with it."""
        learned = VARIANCE[0] in self.options
        variance = None
        if learned and not self.guided_variance:
            variance, outputs = outputs[-1, :, channels:], outputs[:, :, :channels]
        guided = _rescale((outputs * per_sample(guidance)).sum(0), outputs[-1], share)
        if learned and self.guided_variance:
            guided, variance = guided[:, :channels], guided[:, channels:]
        return guided, variance

    def _predict(
        self, sample: Tensor, timestep: Tensor, guidance: Tensor, states: Tensor, named: dict[str, Tensor]
    ) -> Tensor:
        """The UNet's output for every branch, float32 [G,B,C,H,W]."""
        branches, kind = guidance.shape[0], self.precision
        # In float32, as the sinusoids of the sizes are: torch sets values of different types side by side, a
        # graph must not.
        added = {name: named[name] for name in ADDED if name in named}
        if "encoder_hidden_states_2" in named:
            states = torch.cat([states, named["encoder_hidden_states_2"]], dim=-1)
        scale = named.get("timestep_cond")
        with self.sharing.within(*guidance.shape) if self.sharing.applies else nullcontext():
            output = self.unet(
                sample.unsqueeze(0).expand(branches, -1, -1, -1, -1).flatten(0, 1).to(kind),
                timestep.unsqueeze(0).expand(branches, -1).flatten(),
                states.to(kind),
                timestep_cond=None if scale is None else scale.to(kind),
                added_cond_kwargs=added or None,
                return_dict=False,
            )[0].float()
        made: Tensor = output.unflatten(0, guidance.shape)
        return made

    @property
    def precision(self) -> torch.dtype:
        """The data type of the UNet's weights."""
        return next(self.unet.parameters()).dtype


def _rescale(guided: Tensor, prompted: Tensor, share: Tensor) -> Tensor:
    """Guidance rescale, arXiv 2305.08891, section 3.4; samples with no share stay as they are.

    Selected rather than multiplied by zero, because the factor is not finite where all of `guided` is equal.
    """
    factor = share * (_deviation(prompted) / _deviation(guided)) + (1 - share)
    return guided * per_sample(torch.where(share > 0, factor, torch.ones_like(factor)))


def _deviation(values: Tensor) -> Tensor:
    """The standard deviation of every sample, [B]."""
    axes = (1, 2, 3)
    return (values - values.mean(axes, keepdim=True)).square().mean(axes).sqrt()
