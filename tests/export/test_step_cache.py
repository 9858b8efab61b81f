"""Steps with cached deep features: the two graphs against the whole step, and pictures against diffusers."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray

from allaprima.bundle import BackendError, Bundle, ExportError, RequestError, open_bundle
from allaprima.engine import Options, build_bundle
from allaprima.engine.tensorrt import choose_flavour
from allaprima.export import export_checkpoint
from allaprima.export.denoiser import Denoiser
from allaprima.export.graph import GraphPlan
from allaprima.export.parity import reference
from allaprima.export.step import plan_step
from allaprima.export.step_cache import DEEP, FEATURES, SHALLOW, check_cut, plan_deep, plan_shallow
from allaprima.export.unclip import ImageDenoiser
from allaprima.runtime import Pipeline, open_session

from .conftest import Export, Once, write_tiny, write_tiny_kandinsky, write_tiny_kandinsky3
from .test_parity import psnr
from .test_sharing import ATTENDING, PLAIN, make_unet

Arrays = dict[str, NDArray[Any]]
OUTER: dict[str, Any] = {
    "down_block_types": (ATTENDING, PLAIN),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
"""Attention in the outermost level, as Stable Diffusion 1 and 2 have it."""
INNER: dict[str, Any] = {
    "down_block_types": (PLAIN, ATTENDING),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
"""None there, as in SDXL."""
ADDED: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 12 + 6 * 8,
}
UNETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "outer": (OUTER, {}),
    "inner": (INNER, {}),
    "deeper": ({**OUTER, "layers_per_block": 2, "transformer_layers_per_block": 2}, {}),
    "xl": (
        {**INNER, **ADDED},
        {
            "encoder_hidden_states_2": ("G*B", "L", 8),
            "text_embeds": ("G*B", 12),
            "time_ids": ("G*B", 6),
        },
    ),
    "distilled": ({**OUTER, "time_cond_proj_dim": 16}, {"timestep_cond": ("G*B", 16)}),
    "inpainting": (
        {**OUTER, "in_channels": 9},
        {"mask": ("B", 1, "H", "W"), "masked_image_latents": ("B", 4, "H", "W")},
    ),
}


def plan(fields: dict[str, Any], conditions: dict[str, Any]) -> GraphPlan:
    """Of a random UNet's step."""
    unet = make_unet(**fields)
    width = 24 - 8 * ("encoder_hidden_states_2" in conditions)
    module = Denoiser(unet, tuple(conditions))
    told = {"encoder_hidden_states": ("G*B", "L", width)}
    return plan_step("denoiser", module, ("B", 4, "H", "W"), told, conditions, factor=2)


def kandinsky_plan() -> GraphPlan:
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        addition_embed_type_num_heads=64,
        encoder_hid_dim_type="image_proj",
        out_channels=8,
        attention_head_dim=16,
        cross_attention_dim=32,
        encoder_hid_dim=32,
        addition_embed_type="image",
    )
    told = {"image_embeds": ("G*B", 32)}
    return plan_step("denoiser", ImageDenoiser(unet.eval()), ("B", 4, "H", "W"), told, {}, factor=2)


PLANS: dict[str, Callable[[], GraphPlan]] = {
    **{name: lambda case=case: plan(*case) for name, case in UNETS.items()},  # type: ignore[misc]
    "kandinsky": kandinsky_plan,
}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("make", PLANS.values(), ids=PLANS)
@torch.no_grad()
def test_full_then_shallow_is_the_whole_step(
    make: Callable[[], GraphPlan], branches: int, layers: int
) -> None:
    """With the deep features of the same step; with those of another it is another step."""
    whole = make()
    deep, shallow = plan_deep(whole, layers), plan_shallow(whole, layers)
    for each in (whole, deep, shallow):
        assert [spec.name for spec in each.inputs] == list(each.example) == list(each.axes)
    trials = reference(whole, [{"B": 2, "G": branches, "H": 6, "W": 4, "L": 5}] * 2)
    features = []
    for trial in trials:
        inputs = {name: torch.from_numpy(value) for name, value in trial.inputs.items()}
        *made, kept = deep.module(*inputs.values())
        for got, wanted in zip(made, trial.outputs.values(), strict=True):
            torch.testing.assert_close(got, torch.from_numpy(wanted), rtol=1e-5, atol=1e-6)
        spec = shallow.inputs[-1]
        assert (deep.outputs[-1], spec.name) == (spec, FEATURES)
        assert kept.shape == spec.resolve({"B": 2, "G": branches, "H": 6, "W": 4})
        features.append(kept)
        taken = [inputs[each.name] for each in shallow.inputs[:-1]]
        for got, wanted in zip(shallow.module(*taken, kept), trial.outputs.values(), strict=True):
            torch.testing.assert_close(got, torch.from_numpy(wanted), rtol=1e-5, atol=1e-6)
    other, _ = shallow.module(*taken, features[0])
    assert (other - torch.from_numpy(trials[1].outputs["next_sample"])).abs().max() > 1e-3
    # And the model is as it was.
    again, _ = whole.module(*inputs.values())
    torch.testing.assert_close(again, torch.from_numpy(trials[1].outputs["next_sample"]), rtol=0, atol=0)


@torch.no_grad()
def test_only_the_shallow_part_is_computed() -> None:
    whole = plan({**OUTER, "layers_per_block": 2}, {})
    shallow, unet = plan_shallow(whole, 2), whole.module.unet
    assert isinstance(unet, UNet2DConditionModel)
    ran: dict[str, int] = {}
    for name, part in unet.named_modules():
        if not list(part.children()):
            part.register_forward_hook(lambda _, __, made, name=name: ran.__setitem__(name, len(made)))  # type: ignore[misc]
    shallow.module(*shallow.example.values())
    blocks = {".".join(name.split(".")[:4]) for name in ran if "blocks" in name}
    assert blocks == {
        f"{way}_blocks.{block}.{part}.{index}"
        for way, block, index in (("down", 0, 0), ("up", 1, 1), ("up", 1, 2))
        for part in ("resnets", "attentions")
    }
    # What is the same for both branches is computed once.
    assert (ran["down_blocks.0.resnets.0.conv1"], ran["conv_out"]) == (3, 6)


@pytest.mark.parametrize("name", ["inner", "xl", "kandinsky"])
def test_text_that_nothing_attends_to_is_no_input(name: str) -> None:
    whole = PLANS[name]()
    left = {spec.name for spec in whole.inputs} - {spec.name for spec in plan_shallow(whole, 1).inputs}
    assert (
        left
        == {
            "inner": {"encoder_hidden_states"},
            "xl": {"encoder_hidden_states", "encoder_hidden_states_2"},
            "kandinsky": set(),
        }[name]
    )


def config(**fields: Any) -> dict[str, Any]:
    return {**make_unet().config, "_class_name": "UNet2DConditionModel", **fields}


@pytest.mark.parametrize(
    ("fields", "layers", "message"),
    [
        ({}, 3, "cannot have 3 shallow layers: .* has 2, so choose from 1 .* to 2"),
        ({}, -1, "cannot have -1 shallow"),
        ({"layers_per_block": [3, 1]}, 5, "has 4, so"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, 1, "last up block, a AttnUpBlock2D: known are"),
        ({"down_block_types": ["KDownBlock2D", PLAIN]}, 1, "first down block, a KDownBlock2D"),
        ({"_class_name": "Kandinsky3UNet"}, 1, "needs a UNet2DConditionModel, the checkpoint has a Kand"),
    ],
)
def test_what_cannot_be_cut(fields: dict[str, Any], layers: int, message: str) -> None:
    check_cut(config(), 2)
    with pytest.raises(ExportError, match=message):
        check_cut(config(**fields), layers)


def test_kandinsky_3_is_refused(tmp_path: Path) -> None:
    checkpoint = write_tiny_kandinsky3(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match="the checkpoint has a Kandinsky3UNet"):
        export_checkpoint(str(checkpoint), tmp_path / "bundle", step_cache=1)
    assert not (tmp_path / "bundle").exists()
