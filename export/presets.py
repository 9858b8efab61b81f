"""How a distilled model wants to be sampled, which its files do not say: scheduler, steps and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from allaprima.bundle import ExportError
from allaprima.export.family import Family


@dataclass(frozen=True)
class Preset:
    """`scheduler` replaces the checkpoint's class and these of its fields.

    `embedded` is the guidance scale of a model that was distilled with it as an input.
    """

    scheduler: Mapping[str, Any]
    steps: int
    guidance_scale: float
    embedded: float


PRESETS: Mapping[str, Preset] = {
    "turbo": Preset(
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, 1, 0.0, 0.0
    ),
    "lightning": Preset(
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, 4, 0.0, 0.0
    ),
    "lcm": Preset({"_class_name": "LCMScheduler", "timestep_spacing": "leading"}, 4, 1.0, 8.0),
    "tcd": Preset({"_class_name": "TCDScheduler", "timestep_spacing": "leading"}, 4, 0.0, 0.0),
    "flash": Preset({"_class_name": "FlashScheduler"}, 4, 1.0, 0.0),
}
"""SDXL-Turbo and SD-Turbo; SDXL-Lightning; latent consistency models and LoRA (arXiv 2310.04378); trajectory
consistency models and Hyper-SD (arXiv 2402.19159, 2404.13686); Kandinsky 3.1 Flash, whose scheduler is ours:
diffusers has none."""


@dataclass(frozen=True)
class Usage:
    """The defaults that a bundle shall have: a preset's, then steps and guidance; None leaves them."""

    preset: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ExportError(f"there is no preset '{self.preset}': choose {', '.join(PRESETS)}")
        if self.steps is not None and self.steps < 1:
            raise ExportError(f"the default number of steps is {self.steps}: it should be at least 1")

    def apply(self, family: Family) -> Family:
        """The family with these defaults."""
        scheduler, defaults = family.scheduler, family.defaults
        if self.preset is not None:
            preset = PRESETS[self.preset]
            # A field that was a class's default is one no more.
            unset = [
                field for field in scheduler.get("_use_default_values", []) if field not in preset.scheduler
            ]
            scheduler = {**scheduler, **preset.scheduler, "_use_default_values": unset}
            guidance = preset.embedded if "timestep_cond" in family.conditions else preset.guidance_scale
            defaults = replace(defaults, num_inference_steps=preset.steps, guidance_scale=guidance)
        if self.steps is not None:
            defaults = replace(defaults, num_inference_steps=self.steps)
        if self.guidance_scale is not None:
            defaults = replace(defaults, guidance_scale=self.guidance_scale)
        return replace(family, scheduler=scheduler, defaults=defaults)
