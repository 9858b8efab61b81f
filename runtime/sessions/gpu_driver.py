"""What all drivers for an NVIDIA GPU say alike."""

from __future__ import annotations

from allaprima.bundle import BackendError, Component
from allaprima.runtime.cuda import default_gpu


class GpuDriver:
    """The part of backends.Driver that depends on the GPU alone."""

    def precisions(self) -> tuple[str, ...]:
        """What it can compute in, fastest first."""
        return ("fp16", "bf16", "fp32")

    def converts(self) -> bool:
        """A graph runs only in the precision that it was exported in."""
        return False

    def device(self) -> str:
        """The GPU, in the words of an engine's key."""
        return str(default_gpu().device)


def check_precision(name: str, component: Component, precision: str | None) -> None:
    """BackendError for another precision than the component's; None is that."""
    if precision not in (None, component.precision):
        raise BackendError(
            f"{name} computes {component.graph} in the precision it was exported in, {component.precision}, "
            f"not in {precision}: export with --precision {precision}"
        )
