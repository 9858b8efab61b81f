"""Guidance branches are computed once up to the first attention to the text, and nothing changes by it."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from allaprima.export.denoiser import Denoiser
from allaprima.export.sharing import Sharing

PLAIN, ATTENDING = "DownBlock2D", "CrossAttnDownBlock2D"
UNETS: dict[str, dict[str, Any]] = {
    "attention first": {},
    "convolutions first": {
        "down_block_types": (PLAIN, ATTENDING),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "linear projections": {"use_linear_projection": True},
    "two blocks": {"transformer_layers_per_block": 2, "layers_per_block": 2},
}
EMBEDDED: dict[str, dict[str, Any]] = {
    "size": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
    "guidance": {"time_cond_proj_dim": 16},
    "class": {"num_class_embeds": 3},
    "no text": {"only_cross_attention": True},
}


def make_unet(**fields: Any) -> UNet2DConditionModel:
    torch.manual_seed(4)
    usual = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": (ATTENDING, PLAIN),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**usual, **fields}).eval()


@pytest.mark.parametrize("fields", UNETS.values(), ids=UNETS)
@pytest.mark.parametrize("branches", [1, 2, 3])
@torch.no_grad()
def test_nothing_changes(fields: dict[str, Any], branches: int) -> None:
    unet = make_unet(**fields)
    sample, text = torch.randn(2, 4, 8, 12), torch.randn(2 * branches, 5, 24)
    timestep = torch.tensor([999.0, 3.5])
    given = sample.repeat(branches, 1, 1, 1), timestep.repeat(branches), text
    batches: list[int] = []
    unet.conv_in.register_forward_hook(lambda _, __, made: batches.append(len(made)))
    unet.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda _, __, made: batches.append(len(made)))
    expected = unet(*given)[0]
    sharing = Sharing(unet)
    assert sharing.applies
    with sharing.within(branches, 2):
        shared = unet(*given)[0]
    torch.testing.assert_close(shared, expected, rtol=1e-5, atol=1e-6)
    assert batches == [2 * branches, 2 * branches, 2 * branches, 2]
    torch.testing.assert_close(unet(*given)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("fields", EMBEDDED.values(), ids=EMBEDDED)
def test_branches_that_differ_from_the_start_are_not_shared(fields: dict[str, Any]) -> None:
    assert not Sharing(make_unet(**fields)).applies


def test_another_model_is_not_shared() -> None:
    assert not Sharing(torch.nn.Linear(2, 2)).applies


def test_names_of_weights_stay() -> None:
    unet = make_unet()
    assert [name.removeprefix("unet.") for name in Denoiser(unet).state_dict()] == list(unet.state_dict())


def test_an_error_leaves_the_model_as_it_was() -> None:
    unet = make_unet()
    sharing = Sharing(unet)
    with pytest.raises(RuntimeError), sharing.within(2, 1):
        unet(torch.zeros(3, 4, 8, 8), 1, torch.zeros(3, 5, 24))
    unet(torch.zeros(3, 4, 8, 8), 1, torch.zeros(3, 5, 24))
