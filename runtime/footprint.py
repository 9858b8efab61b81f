"""How much memory the parts of a pipeline take, as far as it can be known beforehand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from allaprima.bundle import BackendError, Component
from allaprima.runtime.memory import Tensor

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{infix}B": base**power
    for power, letter in enumerate("KMGT", 1)
    for infix, base in (("", 1000), ("I", 1024))
}
PER_PIXEL = {"bf16": 2500}, 6000
"""Bytes of activations of an autoencoder for each pixel: by precision, and in any other.

Measured with Stable Diffusion 1.5, see docs/memory.md; ONNX Runtime computes fp16 in fp32 on a CPU.
"""
PER_LATENT = {"bf16": 35_000}, 60_000
"""The same of a denoiser, for each latent pixel, lane and guidance branch."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a component's weights once it has run, and the `least` it runs with.

    The two differ where weights can be streamed.
    """

    weights: int
    least: int


def parse_bytes(name: str, value: int | str) -> int:
    """A number of bytes, or a text such as "8GB" (10^9) or "8GiB" (2^30); BackendError naming the option."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value, re.IGNORECASE)
        unit = None if found is None else _UNITS.get(found[2].upper())
        count = None if found is None or unit is None else int(float(found[1]) * unit)
    else:
        count = value if type(value) is int else None
    if count is None or count < 0:
        raise BackendError(f"{name} is {value!r}: give bytes, or a text such as '8GB' or '8GiB'")
    return count


def show_bytes(count: int) -> str:
    """A number of bytes for a message, in decimal units, rounded up so that it is enough."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            tenths = -(-count // 10 ** (power - 1))
            return f"{tenths // 10}.{tenths % 10} {unit}"
    return f"{count} B"


def stored(graph: Path, component: Component | None = None) -> int:
    """Bytes of a graph with the files beside it, which hold its weights, or with what it uses of them.

    Other graphs beside it, which read the same weights, do not count.
    """
    if component is not None and component.weight_bytes is not None:
        return graph.stat().st_size + component.weight_bytes
    files = (path for path in graph.parent.iterdir() if path.suffix != ".onnx" or path.name == graph.name)
    return sum(path.stat().st_size for path in files if path.is_file())


def activations(tensors: Mapping[str, Tensor], precision: str) -> int:
    """Bytes that a run takes beside the weights: the bound tensors, and a share for each pixel of them.

    It is known for the autoencoders' graphs ("image") and for denoisers ("guidance"), others take next to
    nothing: texts are short.
    """
    total = sum(tensor.array.nbytes for tensor in tensors.values())
    if "image" in tensors:
        return total + _share(PER_PIXEL, precision) * (tensors["image"].array.size // 3)
    if "guidance" in tensors and "sample" in tensors:
        lanes, _, height, width = tensors["sample"].array.shape
        count: int = tensors["guidance"].array.shape[0] * lanes * height * width
        return total + _share(PER_LATENT, precision) * count
    return total


def _share(table: tuple[Mapping[str, int], int], precision: str) -> int:
    known, other = table
    return known.get(precision, other)
