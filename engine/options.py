"""How plans are built, as a user may ask for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from allaprima.bundle import STREAMING, BackendError, RequestError
from allaprima.runtime.cuda import current_device
from allaprima.runtime.flavours import FLAVOURS, version

TARGETS = {"7.5": 0x01, "8.0": 0x02, "8.6": 0x04, "8.9": 0x08, "12.0": 0x10, "12.1": 0x20}
"""Compute capabilities that TensorRT-RTX compiles for, with their bits in a plan's header."""
AMPERE_AND_NEWER = ("8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass(frozen=True)
class Options:
    """How a plan is built. `workspace` in bytes and `level` (0 to 5) None are the builder's defaults.

    `targets` are compute capabilities, none is Ampere and newer. `refit`: the weights can be changed later.
    `chunks` is the most that a prompt may have, where the graph takes several. `weight_streaming`: weights
    that do not fit into a memory limit may stay with the host, to be copied with every run.
    """

    targets: tuple[str, ...] = ()
    workspace: int | None = None
    level: int | None = None
    refit: bool = False
    chunks: int = 1
    weight_streaming: bool = False

    def __post_init__(self) -> None:
        for target in self.targets:
            if target not in TARGETS:
                raise RequestError(
                    f"TensorRT-RTX does not compile for compute capability {target}: "
                    f"choose from {', '.join(TARGETS)}, or compile with tensorrt on that GPU"
                )
        if self.level is not None and not 0 <= self.level <= 5:
            raise RequestError(f"optimisation level {self.level}: choose 0 to 5")
        if self.workspace is not None and self.workspace < 1:
            raise RequestError(f"a workspace of {self.workspace} bytes: give at least 1")
        if self.chunks < 1:
            raise RequestError(f"prompts of {self.chunks} chunks: give at least 1")

    def for_targets(self, targets: tuple[str, ...]) -> Options:
        """The same for these compute capabilities."""
        return replace(self, targets=targets)

    def flags(self) -> dict[str, str]:
        """What of this changes a plan, in words, for the engine's key."""
        switches = {"refit": self.refit, STREAMING: self.weight_streaming}
        given = {name: "yes" for name, on in switches.items() if on}
        named = {"workspace": self.workspace, "level": self.level, **given}
        return {name: str(value) for name, value in named.items() if value is not None}

    def check(self, backend: str) -> None:
        """Raises RequestError for what a flavour, its version or this machine does not have."""
        flavour = FLAVOURS[backend]
        if self.targets and not flavour.ahead_of_time:
            raise RequestError(
                f"{backend} compiles for the GPU of this machine, not for {', '.join(self.targets)}: "
                "leave the targets out, or compile with tensorrt-rtx"
            )
        if not self.refit:
            return
        found = version(backend)
        if tuple(map(int, found.split(".")[:2])) < flavour.refits_since:
            since = ".".join(map(str, flavour.refits_since))
            raise RequestError(
                f"{backend} {found} may lose a bias from a refittable engine: install {since} or newer, "
                "or build without refit"
            )
        if flavour.ahead_of_time:
            try:
                current_device()
            except BackendError as cause:
                raise RequestError(
                    f"{backend} makes refittable engines only where an NVIDIA driver is, and here {cause}; "
                    "or build without refit"
                ) from cause
