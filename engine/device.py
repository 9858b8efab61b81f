"""The GPU that TensorRT compiles for."""

from __future__ import annotations

from dataclasses import dataclass

from allaprima.bundle import BackendError


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA device: its name, and its compute capability as in "8.9"."""

    name: str
    capability: str

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability}"


def current_gpu() -> Gpu:
    """The device that CUDA would use in this thread. Raises BackendError if there is none."""
    try:
        from cuda.core import Device
    except ImportError as cause:
        raise BackendError(
            f'the GPU cannot be asked for its kind ({cause}): pip install "cuda-core[cu13]"'
        ) from cause
    try:
        device = Device()
        major, minor = device.compute_capability
        return Gpu(str(device.name), f"{major}.{minor}")
    except Exception as cause:  # the driver's absence and its failures come in many kinds
        reason = (str(cause) or type(cause).__name__).splitlines()[0].rstrip(".")
        raise BackendError(
            f"no NVIDIA GPU works here ({reason}): install its driver, or compile where the GPU is"
        ) from cause
