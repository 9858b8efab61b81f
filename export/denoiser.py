"""The denoiser graph: one whole denoising step for a batch, guidance and sampler update included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHANNELS = ("mask", "masked_image_latents")
"""Conditions that are further channels of the sample, in this order."""
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
    """

    def __init__(self, unet: torch.nn.Module, conditions: Sequence[str] = ()) -> None:
        super().__init__()
        self.unet = unet
        self.conditions = tuple(conditions)

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
            to_prediction: p and q of `prediction = p*sample + q*output`, [B,2].
            bounds: the prediction is clamped to ±bounds, [B]; 3e38 leaves it alone.
            update: [B,3+S], `next = u0*sample + u1*prediction + u2*noise + sum_k u(3+k)*history_k`.
            encoder_hidden_states: conditions, branch-major, [G*B,L,D].
            guidance_rescale: share phi of the guided output that is rescaled to the standard deviation of the
                last branch's, [B]; up to 0 leaves it alone.
            conditions: those that were named.

        Returns:
            next_sample [B,C,H,W] and next_history [S,B,C,H,W], the new prediction in front.
        """
        named = dict(zip(self.conditions, conditions, strict=True))
        scaled = sample * _per_sample(input_scale)
        widened = torch.cat([scaled, *(named[name] for name in CHANNELS if name in named)], dim=1)
        outputs = self._predict(widened, timestep, guidance, encoder_hidden_states, named)
        guided = _rescale((outputs * _per_sample(guidance)).sum(0), outputs[-1], guidance_rescale)
        prediction = _per_sample(to_prediction[:, 0]) * sample + _per_sample(to_prediction[:, 1]) * guided
        limit = _per_sample(bounds)
        prediction = torch.maximum(torch.minimum(prediction, limit), -limit)
        next_sample = (
            _per_sample(update[:, 0]) * sample
            + _per_sample(update[:, 1]) * prediction
            + _per_sample(update[:, 2]) * noise
            + (_per_sample(update[:, 3:].transpose(0, 1)) * history).sum(0)
        )
        return next_sample, torch.cat([prediction.unsqueeze(0), history[:-1]])

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
    return guided * _per_sample(torch.where(share > 0, factor, torch.ones_like(factor)))


def _deviation(values: Tensor) -> Tensor:
    """The standard deviation of every sample, [B]."""
    axes = (1, 2, 3)
    return (values - values.mean(axes, keepdim=True)).square().mean(axes).sqrt()


def _per_sample(values: Tensor) -> Tensor:
    """Append the axes C, H, W, so that [..., B] multiplies [..., B,C,H,W]."""
    return values.reshape(*values.shape, 1, 1, 1)
