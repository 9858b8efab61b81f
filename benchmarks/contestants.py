"""Who is measured. A library that is to be compared with is added in one place: `PEERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from PIL.Image import Image

from allaprima.benchmarks.clock import Share
from allaprima.benchmarks.plan import Settings, Work
from allaprima.bundle import RequestError


@dataclass(frozen=True)
class Painted:
    """What one call painted: the pictures of a batch, and where its time went as far as it is known.

    `stages` are seconds by name ("text", "denoise", "decode", "transfer"); `engine` what the graphs took, by
    component.
    """

    images: Sequence[Image]
    stages: Mapping[str, float] = field(default_factory=dict)
    engine: Mapping[str, Share] = field(default_factory=dict)


class Painter(Protocol):
    """A model that a contestant has opened.

    Between two calls `settings` may be given another prompt and seed.
    """

    settings: Settings

    def paint(self, work: Work) -> Painted:
        """Paint a batch, all of it done when this returns."""

    def host_memory(self) -> int | None:
        """The peak of the process that paints, in bytes, where that is not this one."""

    def close(self) -> None:
        """Let go of everything."""


@dataclass(frozen=True)
class Contestant:
    """A library in its best honest settings.

    `open` is given the settings and all that is to be painted. It is called in a process of its own, where it
    is unpickled: a function of a module, or a partial of one; everything heavy is imported inside.
    `first_picture` gives a command that paints one picture to a file in a new process, None if there is none.
    `bundle` is the folder of the bundle that it runs, for those that run one; `checkpoint` the diffusers
    folder of those that paint from one. `same_picture` is False where it cannot be given the noise and the
    tokens of the others. `gpu` says whether it paints on one. `build` makes its engines for such works, in a
    process of its own, before anything is measured. `versions` are those of its libraries where it runs in
    another interpreter.
    """

    name: str
    precision: str
    open: Callable[[Settings, Sequence[Work]], Painter]
    first_picture: Callable[[Settings, Work, Path], list[str]] | None = None
    backend: str = ""
    bundle: str = ""
    same_picture: bool = True
    gpu: bool = False
    build: Callable[[Sequence[Work]], object] | None = None
    checkpoint: Path | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Field:
    """What peers are chosen by: the model that our runtime paints with, and where.

    `checkpoint` is the diffusers folder of the same weights, None if it was not given; `gpu` whether our own
    contestants are on one.
    """

    bundle: str
    checkpoint: Path | None
    gpu: bool


PEERS: Mapping[str, tuple[str, str]] = {
    "diffusers": (
        "allaprima.benchmarks.peer_diffusers:eager",
        "StableDiffusionPipeline and its kin, torch eager",
    ),
    "diffusers-compile": (
        "allaprima.benchmarks.peer_diffusers:compiled",
        "the same, UNet and decoder compiled by torch",
    ),
    "ort": (
        "allaprima.benchmarks.peer_ort:contestants",
        "ONNX Runtime with plain graphs, diffusers' pipeline around it",
    ),
    "optimum-onnx": ("allaprima.benchmarks.peer_optimum:onnx", "optimum's pipeline on ONNX Runtime"),
    "optimum-intel": ("allaprima.benchmarks.peer_optimum:intel", "optimum's pipeline on OpenVINO"),
    "openvino-genai": (
        "allaprima.benchmarks.peer_openvino_genai:contestants",
        "OpenVINO GenAI's Text2ImagePipeline",
    ),
    "stable-diffusion-cpp": (
        "allaprima.benchmarks.peer_stable_diffusion_cpp:contestants",
        "stable-diffusion.cpp through its Python package",
    ),
}
"""What `--vs` knows: for each name a function from a Field to contestants, and a few words.

The function may raise AllaprimaError where there is no such contestant; the result then says why.
"""


def check_peer(name: str) -> None:
    """Raises RequestError if there is no peer of that name."""
    if name not in PEERS:
        raise RequestError(f"unknown peer '{name}': choose from {', '.join(PEERS)}")


def find_peers(name: str, field: Field) -> list[Contestant]:
    """The contestants of a name of `PEERS`. Raises AllaprimaError where there are none here."""
    module, _, function = PEERS[name][0].partition(":")
    return cast(list[Contestant], getattr(import_module(module), function)(field))
