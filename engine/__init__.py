"""Engines: a bundle compiled for a device, kept in a cache, checked before it is trusted."""

from allaprima.engine.build import Built, Progress, build_bundle
from allaprima.engine.cache import Entry, clear, entries, prune
from allaprima.engine.options import Options
from allaprima.engine.shapes import parse_range, parse_sizes
from allaprima.engine.tensorrt import CompilerInfo, compilers

__all__ = [
    "Built",
    "CompilerInfo",
    "Entry",
    "Options",
    "Progress",
    "build_bundle",
    "clear",
    "compilers",
    "entries",
    "parse_range",
    "parse_sizes",
    "prune",
]
