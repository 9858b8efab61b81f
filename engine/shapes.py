"""From the sizes that a user names to the optimization profiles of every graph of a bundle."""

from __future__ import annotations

import re
from collections.abc import Sequence

from allaprima.bundle import Bundle, Component, Latent, Manifest, Profile, RequestError

Size = tuple[int, int]
"""Width and height in pixels."""


def parse_sizes(text: str) -> tuple[Size, ...]:
    """The sizes of "512x512,768x512". Raises RequestError."""
    sizes = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", word)
        if match is None:
            raise RequestError(f"'{word.strip()}' is no size: write WIDTHxHEIGHT in pixels, as in 768x512")
        sizes.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(sizes))


def parse_range(text: str) -> tuple[int, int]:
    """The batch sizes of "4" or "1-4". Raises RequestError."""
    match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", text)
    if match is None:
        raise RequestError(f"'{text}' is no range of batch sizes: write a number, or two as in 1-4")
    low = int(match[1])
    high = int(match[2]) if match[2] else low
    if not 1 <= low <= high:
        raise RequestError(f"the batch sizes {text} make no range: from at least 1 up to as much or more")
    return low, high


def plan_profiles(
    bundle: Bundle, sizes: Sequence[Size] = (), batch: tuple[int, int] = (1, 1), chunks: int = 1
) -> dict[str, tuple[Profile, ...]]:
    """Narrow profiles for every component, one per picture size, and within it one for a single picture.

    One profile that spans everything costs 13 to 31 % of the speed in NVIDIA's own measurements, so every
    size has its own; batches share one, from the second picture on. The denoiser runs with and without
    guidance (two branches or one), the text encoder takes the prompts of all branches, and the autoencoder
    one picture at a time, as the runtime does. Prompts of one chunk are what a profile serves best.

    Args:
        bundle: whose graphs are to be compiled.
        sizes: width and height of pictures in pixels; none is the bundle's default.
        batch: the smallest and largest number of pictures in a batch.
        chunks: the most that a prompt may have.

    Raises:
        RequestError: a size that is not a multiple of what the model needs.
    """
    manifest = bundle.manifest
    chosen = list(sizes) or [(manifest.defaults.width, manifest.defaults.height)]
    for size in chosen:
        _check_size(size, manifest.latent)
    return {
        name: _plan(component, chosen, batch, chunks, manifest)
        for name, component in manifest.components.items()
    }


def fixed_profiles(bundle: Bundle, sizes: Sequence[Size], batch: int) -> dict[str, tuple[Profile, ...]]:
    """For every component that takes pictures or latents one profile per size, with a single shape in it.

    The denoiser has `batch` lanes and two guidance branches, the autoencoder one picture. No size is the
    bundle's default. Raises RequestError.
    """
    planned = plan_profiles(bundle, sizes, (batch, batch))
    return {
        name: tuple(
            Profile({axis: (most, most, most) for axis, (_, _, most) in profile.extents.items()})
            for profile in profiles
        )
        for name, profiles in planned.items()
        if "H" in profiles[0].extents
    }


def _plan(
    component: Component, sizes: Sequence[Size], batch: tuple[int, int], chunks: int, manifest: Manifest
) -> tuple[Profile, ...]:
    axes = _axes(component)
    if "H" not in axes:
        # Prompts come two for each picture, a negative one with them.
        extents = {"B": (1, 2 * batch[0], 2 * batch[1]), "G": (1, 2, 2)}
        return (Profile({axis: extents[axis] for axis in axes}),)
    lanes = _split(batch) if "G" in axes else [(1, 1, 1)]
    latent, length = manifest.latent, manifest.length
    profiles = []
    for width, height in sizes:
        h, w = height // latent.downscale, width // latent.downscale
        for counts in lanes:
            extents = {"B": counts, "G": (1, 2, 2), "H": (h, h, h), "W": (w, w, w)}
            extents["L"] = (length, length, chunks * length)
            profiles.append(Profile({axis: extents[axis] for axis in axes}))
    return tuple(profiles)


def _axes(component: Component) -> list[str]:
    """The symbolic axes of the inputs, in order: "G*B" gives G and B."""
    parts = (
        part
        for spec in component.inputs
        for axis in spec.shape
        if isinstance(axis, str)
        for part in axis.split("*")
    )
    return [part for part in dict.fromkeys(parts) if not part.isdigit()]


def _split(batch: tuple[int, int]) -> list[tuple[int, int, int]]:
    low, high = batch
    if low > 1 or high == 1:
        return [(low, high, high)]
    return [(1, 1, 1), (2, high, high)]


def _check_size(size: Size, latent: Latent) -> None:
    step = latent.multiple
    if all(side >= step and side % step == 0 for side in size):
        return
    near = "x".join(str(max(step, round(side / step) * step)) for side in size)
    raise RequestError(
        f"{size[0]}x{size[1]} cannot be painted: both sides must be multiples of {step} pixels, as in {near}"
    )
