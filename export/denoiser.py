"""The denoiser graph: one whole denoising step for a batch, guidance and sampler update included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from allaprima.export.update import VARIANCE, advance, per_sample


class Denoiser(torch.nn.Module):
    """A UNet wrapped into one step of any linear sampler (see `allaprima.runtime.samplers.Table`).

    The UNet runs in its own precision, everything around it in float32. B samples, G guidance branches,
    S history slots, C channels, H × W latent size, L text tokens of width D.

    `options` names the inputs beyond those that every graph has, in their order (see
    `allaprima.export.update.OPTIONS`): `THRESHOLDING`, and `VARIANCE` if the UNet makes 2C channels, of which
    the last C tell the variance of the noise. With guidance that is the last branch's variance or, as
    pipelines differ, with `guided_variance` that of all branches together.
    """

    def __init__(
        self, unet: torch.nn.Module, options: Sequence[str] = (), *, guided_variance: bool = False
    ) -> None:
        super().__init__()
        self.unet = unet
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
        *options: Tensor,
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
            to_prediction: p and q of `raw = p*sample + q*output`, [B,2].
            bounds: the prediction is raw, clamped to ±bounds, [B]; 3e38 leaves it alone.
            update: [B,4+S], next = u0*sample + u1*prediction + u2*noise + sum_k u(3+k)*history_k +
                u(3+S)*raw.
            encoder_hidden_states: conditions, branch-major, [G*B,L,D].
            guidance_rescale: share phi of the guided output that is rescaled to the standard deviation of the
                last branch's, [B]; up to 0 leaves it alone.
            options: those that were named:
                thresholds: ratio and most of dynamic thresholding, [B,2], in place of the clamp unless the
                    ratio is negative.
                from_limited: r and s of `prediction = r*sample + s*limited`, [B,2], where limited is what a
                    limit left of raw.
                learned_variance: d and e, [B,2]: noise counts `u2*exp(d*v) + e*sqrt(v)` with the UNet's v.

        Returns:
            next_sample [B,C,H,W] and next_history [S,B,C,H,W], the new prediction in front.
        """
        branches = guidance.shape[0]
        scaled = sample * per_sample(input_scale)
        output = self.unet(
            scaled.unsqueeze(0).expand(branches, -1, -1, -1, -1).flatten(0, 1).to(self.precision),
            timestep.unsqueeze(0).expand(branches, -1).flatten(),
            encoder_hidden_states.to(self.precision),
            return_dict=False,
        )[0].float()
        outputs = output.unflatten(0, guidance.shape)
        named = dict(zip(self.options, options, strict=True))
        guided, variance = self._guide(outputs, guidance, guidance_rescale, sample.shape[1])
        row = {"to_prediction": to_prediction, "bounds": bounds, "update": update, **named}
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
