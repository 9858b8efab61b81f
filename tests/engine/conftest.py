"""The small bundle of the runtime's tests is also what engines are built from."""

from ..runtime.conftest import bundle, manifest

__all__ = ["bundle", "manifest"]
