"""Samplers on the listed timesteps of a variance-preserving process: DDIM, DDPM and UnCLIP."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from allaprima.bundle.errors import RequestError
from allaprima.runtime.samplers.limit import UNLIMITED, Clipping, Limit, clip
from allaprima.runtime.samplers.run import Run
from allaprima.runtime.samplers.table import Draft, denoised
from allaprima.runtime.schedule import (
    F64,
    PREDICTIONS,
    Training,
    read_options,
    require,
    spaced_timesteps,
    training_alphas,
    training_betas,
    training_indices,
)


@dataclass(frozen=True)
class DDIMOptions(Clipping):
    """Fields and defaults of ``DDIMScheduler``."""

    sampler: ClassVar[str] = "ddim"

    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False


@dataclass(frozen=True)
class DDPMOptions(Clipping):
    """Fields and defaults of ``DDPMScheduler``."""

    sampler: ClassVar[str] = "ddpm"

    variance_type: str | None = "fixed_small"
    rescale_betas_zero_snr: bool = False


@dataclass(frozen=True)
class UnCLIPOptions(Training):
    """Fields and defaults of ``UnCLIPScheduler``."""

    sampler: ClassVar[str] = "unclip"
    beta_schedules: ClassVar[tuple[str, ...]] = ("squaredcos_cap_v2",)

    beta_schedule: str = "squaredcos_cap_v2"
    variance_type: str = "fixed_small_log"
    clip_sample: bool = True
    clip_sample_range: float = 1.0


def ddim(config: Mapping[str, Any], run: Run) -> Draft:
    """Song et al. 2021, equations 12 and 16; ``run.eta`` is 0 for the ODE, 1 for the noise of DDPM.

    A limit holds for the clean sample only: the noise beside it is the raw prediction's, as in diffusers.
    """
    options = read_options(DDIMOptions, config)
    require(options, "prediction_type", *PREDICTIONS)
    table = training_alphas(options, zero_snr=options.rescale_betas_zero_snr).astype(np.float64)
    timesteps = training_indices(spaced_timesteps(options, run.steps), options)
    previous = timesteps - options.num_train_timesteps // run.steps
    final = 1.0 if options.set_alpha_to_one else table[0]
    a, p = table[timesteps], np.where(previous >= 0, table[np.maximum(previous, 0)], final)
    alpha, sigma = np.sqrt(a), np.sqrt(1 - a)
    noise = run.eta * np.sqrt((1 - p) / (1 - a) * (1 - a / p))
    direction = np.sqrt(np.maximum(1 - p - noise**2, 0)) / sigma
    free = options.limit == UNLIMITED
    return Draft(
        timesteps.astype(np.float64),
        denoised(options.prediction_type, alpha, sigma),
        np.stack([direction, np.sqrt(p) - direction * alpha * free, noise], axis=1),
        limit=options.limit,
        draws=run.eta > 0,
        levels=np.stack([alpha, sigma], axis=1),
        raw=None if free else -direction * alpha,
    )


def ddpm(config: Mapping[str, Any], run: Run) -> Draft:
    """Ho et al. 2020, equation 7, between listed timesteps; noise at every call but one at timestep 0."""
    options = read_options(DDPMOptions, config)
    require(options, "prediction_type", *PREDICTIONS)
    # DPM-Solver's configurations say None, which diffusers then takes as fixed_small.
    require(
        options,
        "variance_type",
        *("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range", None),
    )
    table = training_alphas(options, zero_snr=options.rescale_betas_zero_snr).astype(np.float64)
    listed = spaced_timesteps(options, run.steps) if run.timesteps is None else run.timesteps
    timesteps = training_indices(listed, options)
    a = table[timesteps]
    return _posterior(options, timesteps, a, 1 - a / np.append(a[1:], 1.0), options.limit)


def unclip(config: Mapping[str, Any], run: Run) -> Draft:
    """DDPM's posterior on a cosine schedule, evenly from the last timestep to 0 (Ramesh et al. 2022)."""
    options = read_options(UnCLIPOptions, config)
    require(options, "prediction_type", "epsilon", "sample")
    require(options, "variance_type", "fixed_small_log", "learned_range")
    require(options, "trained_betas", None)
    if run.steps < 2:
        raise RequestError("num_inference_steps 1 is out of range: sampler 'unclip' takes 2 or more")
    spaced = np.arange(run.steps)[::-1] * ((options.num_train_timesteps - 1) / (run.steps - 1))
    timesteps = training_indices(spaced, options)
    a = training_alphas(options).astype(np.float64)[timesteps]
    # For a single timestep diffusers takes the beta of the schedule, which keeps more digits than 1 - a / p;
    # at the last step, where they differ by 5e-4, it shows.
    single = np.append(timesteps[1:], -1) == timesteps - 1
    betas = training_betas(options).astype(np.float64)[timesteps]
    limit = clip(options.clip_sample_range) if options.clip_sample else UNLIMITED
    return _posterior(options, timesteps, a, np.where(single, betas, 1 - a / np.append(a[1:], 1.0)), limit)


def _posterior(
    options: DDPMOptions | UnCLIPOptions, timesteps: NDArray[np.int64], a: F64, beta: F64, limit: Limit
) -> Draft:
    """Steps of size ``beta`` between timesteps whose cumulative products are ``a``, [N] each."""
    p = np.append(a[1:], 1.0)
    clean, sample = np.sqrt(p) * beta / (1 - a), np.sqrt(1 - beta) * (1 - p) / (1 - a)
    small = np.maximum(beta * (1 - p) / (1 - a), 1e-20)
    noisy = timesteps > 0
    deviation, learned = _deviation(options.variance_type, small, beta)
    return Draft(
        timesteps.astype(np.float64),
        denoised(options.prediction_type, np.sqrt(a), np.sqrt(1 - a)),
        np.stack([sample, clean, np.where(noisy, deviation, 0.0)], axis=1),
        limit=limit,
        draws=noisy,
        levels=np.sqrt(np.stack([a, 1 - a], axis=1)),
        learned_variance=None if learned is None else np.where(noisy[:, None], learned, 0.0),
    )


def _deviation(kind: str | None, small: F64, large: F64) -> tuple[F64, F64 | None]:
    """The noise's standard deviation [N], and what the model has to say in it [N, 2] (see `table`).

    "learned_range" is Nichol and Dhariwal 2021, equation 15: the model's v, from -1 to 1, lies between the
    logarithms of the ``small`` variance and the ``large`` one. "learned" is the variance itself.
    """
    if kind == "learned_range":
        logs = np.log(np.stack([small, large], axis=1))
        range_ = np.stack([(logs[:, 1] - logs[:, 0]) / 4, np.zeros(len(small))], axis=1)
        return np.exp(logs.sum(axis=1) / 4), range_
    if kind == "learned":
        return np.zeros(len(small)), np.tile([0.0, 1.0], (len(small), 1))
    return np.sqrt(large if kind == "fixed_large" else small), None
