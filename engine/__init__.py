"""Engines: a bundle compiled for this machine, kept in a cache, checked before it is trusted."""

from allaprima.engine.build import Built, Progress, build_bundle
from allaprima.engine.cache import Entry, clear, entries, prune

__all__ = ["Built", "Entry", "Progress", "build_bundle", "clear", "entries", "prune"]
