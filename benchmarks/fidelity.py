"""How good pictures are as a whole: Fréchet inception distance and CLIP score, and MLPerf's gate.

Both are arithmetic on features; see `features` for the models that these come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allaprima.bundle import RequestError

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """A normal distribution of features: `mean` [D], `covariance` [D,D]."""

    mean: F64
    covariance: F64

    def __post_init__(self) -> None:
        width = self.mean.shape[0] if self.mean.ndim == 1 else -1
        if self.covariance.shape != (width, width):
            raise RequestError(
                f"statistics of shapes {self.mean.shape} and {self.covariance.shape} are no mean and "
                "covariance"
            )


def statistics_of(features: ArrayLike) -> Statistics:
    """Of features [N,D]. Raises RequestError for less than 2 of them, or one that is not finite."""
    values = np.asarray(features, np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise RequestError(f"features of shape {values.shape} have no covariance: give 2 pictures or more")
    if not np.isfinite(values).all():
        raise RequestError("a picture has features that are not finite")
    return Statistics(values.mean(0), np.atleast_2d(np.cov(values, rowvar=False)))


def read_statistics(file: Path) -> Statistics:
    """Read an .npz with "mu" and "sigma", as pytorch-fid and MLPerf keep theirs. Raises RequestError."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return Statistics(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64))
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"{file} holds no statistics (an .npz with mu and sigma): {error}") from error


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """The Fréchet distance of two normal distributions, squared, as FID has it.

    |m1 - m2|² + Tr(C1 + C2 - 2 (C1 C2)^½), of M. Heusel et al., "GANs trained by a two time-scale update rule
    converge to a local Nash equilibrium" (2017), section 3. The last trace is that of the root of
    C1^½ C2 C1^½, which is symmetric: no imaginary parts come up, and a singular C1 C2 needs no care.

    Raises RequestError if they are of different widths.
    """
    if one.mean.shape != other.mean.shape:
        raise RequestError(
            f"features of {len(one.mean)} and {len(other.mean)} numbers come from different models"
        )
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = root @ other.covariance @ root
    shared = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    apart = np.square(one.mean - other.mean).sum()
    return float(apart + np.trace(one.covariance) + np.trace(other.covariance) - 2 * shared)


def clip_score(pictures: ArrayLike, texts: ArrayLike) -> float:
    """100 times the mean cosine of pictures' and texts' embeddings, both [N,D], as MLPerf has it.

    J. Hessel et al., "CLIPScore" (2021), would count a negative cosine as 0; MLPerf takes it as it is.

    Raises RequestError for none, for different numbers of them, or for an embedding of length 0.
    """
    one, other = np.asarray(pictures, np.float64), np.asarray(texts, np.float64)
    if one.shape != other.shape or one.ndim != 2 or not len(one):
        raise RequestError(f"embeddings of shapes {one.shape} and {other.shape} are no pairs")
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    if not (lengths > 0).all():
        raise RequestError("an embedding has the length 0 or is not finite")
    return float(100 * ((one * other).sum(1) / lengths).mean())


@dataclass(frozen=True)
class Gate:
    """What a submission must reach: intervals of FID and of CLIP score on a number of pictures."""

    name: str
    samples: int
    fid: tuple[float, float]
    clip: tuple[float, float]


MLPERF_SDXL = Gate(
    "MLPerf Inference, Stable Diffusion XL",
    samples=5000,
    fid=(23.01085758, 23.95007626),
    clip=(31.68631873, 31.81331801),
)


def judge(gate: Gate, samples: int, fid: float | None, clip: float | None) -> tuple[bool | None, str]:
    """Whether pictures pass a gate, and why not; None where it cannot be said."""
    if samples != gate.samples:
        return None, f"the gate of {gate.name} is for {gate.samples} pictures, not {samples}"
    measured = (("FID", fid, gate.fid), ("CLIP score", clip, gate.clip))
    unknown = [name for name, value, _ in measured if value is None]
    if unknown:
        return None, f"the gate of {gate.name} needs the {' and the '.join(unknown)}"
    outside = [
        f"{name} {value:.4f} is outside [{low}, {high}]"
        for name, value, (low, high) in measured
        if value is not None and not low <= value <= high
    ]
    return not outside, "; ".join(outside)
