"""The denoiser graph: one whole denoising step for a batch, guidance and sampler update included."""

from __future__ import annotations

import torch
from torch import Tensor


class Denoiser(torch.nn.Module):
    """A UNet wrapped into one step of any linear sampler (see `allaprima.runtime.samplers.Table`).

    The UNet runs in its own precision, everything around it in float32. B samples, G guidance branches,
    S history slots, C channels, H × W latent size, L text tokens of width D.
    """

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

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

        Returns:
            next_sample [B,C,H,W] and next_history [S,B,C,H,W], the new prediction in front.
        """
        branches = guidance.shape[0]
        scaled = sample * _per_sample(input_scale)
        output = self.unet(
            scaled.unsqueeze(0).expand(branches, -1, -1, -1, -1).flatten(0, 1).to(self.precision),
            timestep.unsqueeze(0).expand(branches, -1).flatten(),
            encoder_hidden_states.to(self.precision),
            return_dict=False,
        )[0].float()
        outputs = output.unflatten(0, guidance.shape)
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
