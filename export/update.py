"""The second half of a denoising step: from the model's guided output to the next sample."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

OPTIONS = {"thresholds": 2, "from_limited": 2, "learned_variance": 2}
"""What a graph has only if it was exported for it: inputs of float32 [B, so many]."""
THRESHOLDING = ("thresholds", "from_limited")
VARIANCE = ("learned_variance",)
_ROUNDS = 32  # halvings of a range of float32: its smallest part is below the last bit of its largest value


def advance(
    sample: Tensor,
    history: Tensor,
    noise: Tensor,
    output: Tensor,
    variance: Tensor | None,
    row: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """The next sample [B,C,H,W] and history [S,B,C,H,W] by one row of a sampler's table.

    Args:
        sample: current latents, [B,C,H,W].
        history: earlier predictions, newest first, [S,B,C,H,W].
        noise: this step's noise, [B,C,H,W].
        output: the model's, after guidance, [B,C,H,W].
        variance: what the model says of the noise's variance, likewise; None if it says nothing.
        row: the inputs to_prediction, bounds and update of `denoiser`, and those of `OPTIONS` that there are.
    """
    scale, weight = row["to_prediction"].unbind(1)
    raw = per_sample(scale) * sample + per_sample(weight) * output
    prediction = _limit(sample, raw, row)
    update = row["update"]
    fresh = per_sample(update[:, 2])
    if variance is not None:
        span, share = row["learned_variance"].unbind(1)
        fresh = fresh * torch.exp(per_sample(span) * variance)
        fresh = fresh + per_sample(share) * variance.clamp(min=0).sqrt()
    next_sample = (
        per_sample(update[:, 0]) * sample
        + per_sample(update[:, 1]) * prediction
        + fresh * noise
        + (per_sample(update[:, 3:-1].transpose(0, 1)) * history).sum(0)
        + per_sample(update[:, -1]) * raw
    )
    return next_sample, torch.cat([prediction.unsqueeze(0), history[:-1]])


def _limit(sample: Tensor, raw: Tensor, row: Mapping[str, Tensor]) -> Tensor:
    """What is kept of a raw prediction [B,C,H,W]: clamped, or thresholded and turned into what is wanted."""
    bound = per_sample(row["bounds"])
    limited = torch.maximum(torch.minimum(raw, bound), -bound)
    if "thresholds" not in row:
        return limited
    ratio, most = row["thresholds"].unbind(1)
    level = per_sample(torch.minimum(quantile(raw.abs().flatten(1), ratio).clamp(min=1), most))
    thresholded = torch.maximum(torch.minimum(raw, level), -level) / level
    limited = torch.where(per_sample(ratio) >= 0, thresholded, limited)
    back, share = row["from_limited"].unbind(1)
    return per_sample(back) * sample + per_sample(share) * limited


def quantile(values: Tensor, ratio: Tensor) -> Tensor:
    """Quantiles [B] of values [B,N] that are not negative, each with its own ratio [B], interpolated.

    By bisection on the value, since ONNX has no sort, and its TopK takes no more than 3,840 in TensorRT.
    """
    place = ratio * (values.shape[1] - 1)
    rank = place.floor()
    low, high = torch.zeros_like(rank), values.amax(1)
    for _ in range(_ROUNDS):  # more than `rank` values are at most `high`, but not of `low`
        middle = (low + high) / 2
        enough = _count(values, middle) > rank
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    inside = values <= high.unsqueeze(1)
    lower = torch.where(inside, values, torch.zeros_like(values)).amax(1)
    above = torch.where(inside, torch.full_like(values, 3e38), values).amin(1)
    upper = torch.where((_count(values, high) > rank + 1) | (place <= rank), lower, above)
    return lower + (place - rank) * (upper - lower)


def _count(values: Tensor, limit: Tensor) -> Tensor:
    """How many values [B,N] are at most a limit [B], as float32, which counts exactly to 16 million."""
    return (values <= limit.unsqueeze(1)).float().sum(1)


def per_sample(values: Tensor) -> Tensor:
    """Append the axes C, H, W, so that [..., B] multiplies [..., B,C,H,W]."""
    return values.reshape(*values.shape, 1, 1, 1)
