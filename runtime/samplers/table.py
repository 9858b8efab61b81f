"""The table: a sampler as numbers, one row for each call of the denoiser.

One row says how the denoiser graph makes the next sample, for which everything is linear but the limit:

    output     = unet(sample * input_scale, timestep)                   after guidance
    raw        = p * sample + q * output                                to_prediction = (p, q)
    limited    = clamp(raw, -bound, bound), or thresholded              thresholds = (ratio, most)
    prediction = limited, or r * sample + s * limited                   from_limited = (r, s)
    next       = u0 * sample + u1 * prediction + u2 * noise + sum_k u[3 + k] * history[k] + u[3 + S] * raw

The history holds the predictions of earlier calls, newest first; this call's prediction is pushed afterwards.
Most samplers predict the clean sample (Karras' "denoised"), PNDM keeps the raw output of the model. Where a
model predicts variances v, the noise counts u2 * exp(d * v) + e * sqrt(v), with learned_variance = (d, e).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allaprima.bundle.errors import RequestError
from allaprima.runtime.samplers.limit import UNLIMITED, Limit
from allaprima.runtime.schedule import F32, F64


@dataclass(frozen=True, eq=False)
class Table:
    """What the denoiser needs at each of its N calls; S history slots. The arrays are read-only."""

    sampler: str
    """Canonical name; with the same configuration it makes the same table again."""
    timesteps: F32
    """[N], handed to the UNet."""
    input_scale: F32
    """[N], c_in of Karras et al."""
    to_prediction: F32
    """[N, 2]"""
    bounds: F32
    """[N], `NO_BOUND` where nothing is clamped."""
    update: F32
    """[N, 4 + S]"""
    draws: NDArray[np.bool_]
    """[N], whether noise is drawn at this call, even if its coefficient is 0: it moves the random stream."""
    echoes: F32
    """[N], how much of the noise drawn at the last call is added to that of this one."""
    init_noise_sigma: float
    """The initial sample is noise times this."""
    levels: F32 | None
    """[N, 2], the sample before each call: a picture's latents times the first, plus noise times the second.

    None for samplers that cannot begin with a picture.
    """
    clean: F32
    """[N, 2], the clean sample as it looks after each call: the next sample times the first, plus this call's
    prediction times the second."""
    thresholds: F32 | None
    """[N, 2], for graphs that can threshold; None if there is nothing to."""
    from_limited: F32 | None
    """[N, 2], likewise; None where the prediction is what was limited."""
    learned_variance: F32 | None
    """[N, 2], for models that predict variances; None if they do not count."""


@dataclass(frozen=True)
class Draft:
    """A table in float64, as a sampler writes it: K <= S history slots, rare columns by default."""

    timesteps: F64
    """[N]"""
    to_prediction: F64
    """[N, 2]"""
    update: F64
    """[N, 3 + K]"""
    input_scale: F64 | float = 1.0
    limit: Limit = UNLIMITED
    draws: NDArray[np.bool_] | bool = False
    init_noise_sigma: float = 1.0
    levels: F64 | None = None
    """[N, 2], how much of the clean sample and of noise is in the sample before each call."""
    calls: int = 1
    """Of the model in each step but the last."""
    clean: F64 | None = None
    """[N, 2]; None where the prediction is the clean sample itself."""
    raw: F64 | None = None
    """[N], the last column of the table's update."""
    echoes: F64 | None = None
    """[N]"""
    from_limited: F64 | None = None
    """[N, 2]"""
    learned_variance: F64 | None = None
    """[N, 2]"""

    def begun(self, step: int) -> "Draft":
        """Without the calls before a step; RequestError if the sampler cannot begin there."""
        row = step * self.calls
        arrays: dict[str, Any] = {
            name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return replace(self, **{name: value[row:] for name, value in arrays.items()})

    def finish(self, sampler: str, history: int) -> Table:
        """Pad the history to S slots and round to float32.

        Raises:
            RequestError: the sampler needs more history than there is, or a coefficient is not finite.
        """
        count, width = self.update.shape
        if width > 3 + history:
            raise RequestError(
                f"sampler {sampler!r} needs {width - 3} earlier predictions, the denoiser keeps {history}:"
                " choose another sampler, or export the checkpoint again"
            )
        update = np.pad(self.update, ((0, 0), (0, 4 + history - width)))
        if self.raw is not None:
            update[:, -1] = self.raw
        optional = (self.echoes, self.from_limited, self.learned_variance)
        given = [self.to_prediction, update, *(values for values in optional if values is not None)]
        if not all(np.isfinite(values).all() for values in given):
            raise RequestError(
                f"sampler {sampler!r} has no finite coefficients for {count} calls on this schedule:"
                " use fewer steps or, if it begins in pure noise (rescale_betas_zero_snr), v_prediction"
            )
        threshold = self.limit.ratio, self.limit.most
        return Table(
            sampler,
            timesteps=_sealed(self.timesteps),
            input_scale=_sealed(np.broadcast_to(self.input_scale, count)),
            to_prediction=_sealed(self.to_prediction),
            bounds=_sealed(np.full(count, self.limit.bound)),
            update=_sealed(update),
            draws=np.broadcast_to(np.asarray(self.draws), count),
            echoes=_sealed(np.zeros(count) if self.echoes is None else self.echoes),
            init_noise_sigma=float(self.init_noise_sigma),
            levels=_maybe(self.levels),
            clean=_sealed(np.tile([0.0, 1.0], (count, 1)) if self.clean is None else self.clean),
            thresholds=_sealed(np.tile(threshold, (count, 1))) if self.limit.ratio >= 0 else None,
            from_limited=_maybe(self.from_limited),
            learned_variance=_maybe(self.learned_variance),
        )


def _sealed(values: F64) -> F32:
    rounded = np.ascontiguousarray(values, np.float32)
    rounded.flags.writeable = False
    return rounded


def _maybe(values: F64 | None) -> F32 | None:
    return None if values is None else _sealed(values)


def idle_row(history: int) -> Table:
    """The one-row table of an idle lane: the sample stays, the model sees zeros, nothing is drawn."""
    update = np.zeros((1, 3 + history))
    update[0, 0] = 1.0
    return Draft(np.zeros(1), np.zeros((1, 2)), update, input_scale=0.0).finish("idle", history)


def denoised(prediction_type: str, alpha: F64, sigma: F64) -> F64:
    """Coefficients (p, q) of the clean sample for a sample ``alpha * clean + sigma * noise``.

    Args:
        prediction_type: what the model gives: "epsilon", "v_prediction" (Salimans and Ho 2022) or "sample".
        alpha: [N]
        sigma: [N], with alpha**2 + sigma**2 = 1

    Returns:
        [N, 2]
    """
    if prediction_type == "epsilon":
        return np.stack([1 / alpha, -sigma / alpha], axis=1)
    if prediction_type == "v_prediction":
        return np.stack([alpha, -sigma], axis=1)
    return np.tile([0.0, 1.0], (len(alpha), 1))


def clean_from_noise(alpha: F64, sigma: F64) -> F64:
    """`Draft.clean` of a prediction that is the noise; the next sample is ``alpha * clean + sigma * noise``.

    Args:
        alpha: [N]
        sigma: [N]

    Returns:
        [N, 2]
    """
    return np.stack([1 / alpha, -sigma / alpha], axis=1)
