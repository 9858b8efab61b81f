"""Step caching: which steps of a request take the deep features of an earlier one, and the graphs for it."""

from __future__ import annotations

from allaprima.bundle import Manifest, RequestError
from allaprima.runtime import fields

DEEP, SHALLOW = "denoiser_deep", "denoiser_shallow"
"""The components: a whole step that hands out its deep features, and one that takes those of another."""
FEATURES = "deep_features"
"""What goes from the one to the other."""


def read_interval(value: object, manifest: Manifest) -> int:
    """The interval of a request. Raises RequestError, also if the bundle has not the graphs for it."""
    interval = fields.whole("cache_interval", value, 1)
    missing = [role for role in (DEEP, SHALLOW) if role not in manifest.components]
    if interval > 1 and missing:
        raise RequestError(
            f"cache_interval is {interval}, but the bundle {manifest.name} has no graphs for it: "
            "leave it out, or export the checkpoint again with --step-cache"
        )
    return interval


def is_full(row: int, interval: int) -> bool:
    """Whether a row of the request's table, a call of the model, is computed in full.

    The first is, and every `interval`-th after it: 1:N caching of X. Ma et al., "DeepCache: Accelerating
    Diffusion Models for Free" (arXiv 2312.00858), section 3.3.
    """
    return row % interval == 0
