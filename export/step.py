"""How a whole denoising step is traced: its inputs by name and shape, and which of their axes vary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from allaprima.bundle import TensorSpec
from allaprima.export.denoiser import Denoiser
from allaprima.export.graph import GraphPlan
from allaprima.export.update import OPTIONS

HISTORY = 4
"""S: what the longest multistep samplers (PLMS, LMS of order 4) look back on."""

Shape = tuple[int | str, ...]


def plan_step(
    name: str,
    module: Denoiser,
    sample: Shape,
    told: Mapping[str, Shape],
    conditions: Mapping[str, Shape],
    *,
    factor: int = 1,
    length: int = 1,
) -> GraphPlan:
    """The plan of a step on a sample of this shape.

    `told` is the one condition that `Denoiser.forward` always takes, `conditions` are the further ones. H and
    W are multiples of `factor`, L is traced at `length`.
    """
    shapes: dict[str, Shape] = {
        "sample": sample,
        "history": (HISTORY, *sample),
        "noise": sample,
        "timestep": ("B",),
        "input_scale": ("B",),
        "guidance": ("G", "B"),
        "to_prediction": ("B", 2),
        "bounds": ("B",),
        "update": ("B", 4 + HISTORY),
        **told,
        "guidance_rescale": ("B",),
        **conditions,
        **{option: ("B", OPTIONS[option]) for option in module.options},
    }
    specs = tuple(TensorSpec(input_, "float32", shape) for input_, shape in shapes.items())
    # No two extents agree, so that none is taken for another.
    sizes = {"B": 3, "G": 2, "G*B": 6, "H": 5 * factor, "W": 7 * factor, "L": length}
    dims: dict[str, Any] = {"B": "B", "G": "G", "G*B": "GB", "L": "L"}
    dims |= {axis: factor * torch.export.Dim(axis.lower(), min=1, max=4096) for axis in ("H", "W")}
    return GraphPlan(
        name=name,
        module=module,
        example={spec.name: torch.randn(spec.resolve(sizes)) for spec in specs},
        axes={
            spec.name: {k: dims[axis] for k, axis in enumerate(spec.shape) if isinstance(axis, str)}
            for spec in specs
        },
        inputs=specs,
        outputs=(
            TensorSpec("next_sample", "float32", sample),
            TensorSpec("next_history", "float32", (HISTORY, *sample)),
        ),
    )
