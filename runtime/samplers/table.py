"""The table: a sampler as numbers, one row for each call of the denoiser.

One row says how the denoiser graph makes the next sample, for which everything is linear except a clamp:

    output     = unet(sample * input_scale, timestep)                   after guidance
    prediction = clamp(p * sample + q * output, -bound, bound)          to_prediction = (p, q)
    next       = u0 * sample + u1 * prediction + u2 * noise + sum_k u[3 + k] * history[k]

The history holds the predictions of earlier calls, newest first; this call's prediction is pushed afterwards.
Most samplers predict the clean sample (Karras' "denoised"), PNDM keeps the raw output of the model.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from allaprima.bundle.errors import RequestError
from allaprima.runtime.schedule import F32, F64

NO_BOUND = 3e38  # finite in float32, so a clamp to it changes nothing


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
    """[N, 3 + S]"""
    draws: NDArray[np.bool_]
    """[N], whether noise is drawn at this call, even if its coefficient is 0: it moves the random stream."""
    init_noise_sigma: float
    """The initial sample is noise times this."""
    levels: F32 | None
    """[N, 2], the sample before each call: a picture's latents times the first, plus noise times the second.

    None for samplers that cannot begin with a picture.
    """
    clean: F32
    """[N, 2], the clean sample as it looks after each call: the next sample times the first, plus this call's
    prediction times the second."""


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
    bound: float = NO_BOUND
    draws: NDArray[np.bool_] | bool = False
    init_noise_sigma: float = 1.0
    levels: F64 | None = None
    """[N, 2], how much of the clean sample and of noise is in the sample before each call."""
    calls: int = 1
    """Of the model in each step but the last."""
    clean: F64 | None = None
    """[N, 2]; None where the prediction is the clean sample itself."""

    def begun(self, step: int) -> "Draft":
        """Without the calls before a step; RequestError if the sampler cannot begin there."""
        row = step * self.calls
        return replace(
            self,
            timesteps=self.timesteps[row:],
            to_prediction=self.to_prediction[row:],
            update=self.update[row:],
            input_scale=self.input_scale if isinstance(self.input_scale, float) else self.input_scale[row:],
            draws=self.draws if isinstance(self.draws, bool) else self.draws[row:],
            levels=None if self.levels is None else self.levels[row:],
            clean=None if self.clean is None else self.clean[row:],
        )

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
        update = np.pad(self.update, ((0, 0), (0, 3 + history - width)))
        if not (np.isfinite(update).all() and np.isfinite(self.to_prediction).all()):
            raise RequestError(
                f"sampler {sampler!r} has no finite coefficients for {count} calls on this schedule:"
                " use fewer steps or, if it begins in pure noise (rescale_betas_zero_snr), v_prediction"
            )
        return Table(
            sampler,
            timesteps=_sealed(self.timesteps),
            input_scale=_sealed(np.broadcast_to(self.input_scale, count)),
            to_prediction=_sealed(self.to_prediction),
            bounds=_sealed(np.full(count, self.bound)),
            update=_sealed(update),
            draws=np.broadcast_to(np.asarray(self.draws), count),
            init_noise_sigma=float(self.init_noise_sigma),
            levels=None if self.levels is None else _sealed(self.levels),
            clean=_sealed(np.tile([0.0, 1.0], (count, 1)) if self.clean is None else self.clean),
        )


def _sealed(values: F64) -> F32:
    rounded = np.ascontiguousarray(values, np.float32)
    rounded.flags.writeable = False
    return rounded


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
