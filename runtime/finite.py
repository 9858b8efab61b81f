"""Latents that are infinite or not a number: found before they become a black picture, and where it began."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from allaprima.runtime.conditioning import STATES
from allaprima.runtime.session import Session
from allaprima.runtime.stages import POOLED, Denoiser, not_finite

LARGEST = 1e6
"""No latent comes near it. Where a backend clamps what is not a number, it becomes the bound, about 3e38."""


def check_latents(denoiser: Denoiser, sessions: Mapping[str, Session]) -> None:
    """Raise BackendError if the latents are not finite, naming the graph that it began with.

    Only then are the text encoders' outputs looked at: what they spoil shows in the latents, and looking
    before would make a device wait.
    """
    denoiser.pull()
    if (np.abs(denoiser.sample) < LARGEST).all():
        return
    denoiser.pull_conditions()
    for role, name in STATES.items():
        if role not in sessions:
            continue
        names = [name, POOLED] if POOLED in sessions[role].outputs else [name]
        if not all(_finite(denoiser.conditions[each].array) for each in names if each in denoiser.conditions):
            raise not_finite(role, sessions[role].precision)
    raise not_finite("denoiser", sessions["denoiser"].precision)


def _finite(array: NDArray[np.float32]) -> bool:
    return bool(np.isfinite(array).all())
