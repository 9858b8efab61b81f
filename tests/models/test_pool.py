"""What the UNet learns from: class maps, whitened latents, and the extra channels that are cut off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from allaprima.models.shapes import networks
from allaprima.models.shapes.autoencoder import FAINT, SCALING, whiten
from allaprima.models.shapes.captions import caption
from allaprima.models.shapes.pool import CAPTIONS, MAP_CLASSES, Pool, as_batch, class_maps, make_pool
from allaprima.models.shapes.scenes import COLOURS, KINDS, Scene, Thing, draw_scene, draw_split
from allaprima.models.shapes.training import generator

SCENE = Scene(
    192,
    128,
    "cyan",
    (Thing("star", "red", "medium", 50.0, 64.0, 24.0), Thing("ring", "black", "small", 144.0, 60.0, 18.0)),
    relation="left of",
)


def test_class_maps() -> None:
    kinds, colours = class_maps(SCENE)
    assert kinds.shape == (16, 24)
    assert set(np.unique(kinds)) == {0, KINDS.index("star") + 1, KINDS.index("ring") + 1}
    assert kinds[8, 6] == KINDS.index("star") + 1
    assert colours[8, 6] == COLOURS.index("red")
    assert colours[7, 18] == COLOURS.index("black")  # the hole of a ring belongs to it
    assert set(colours[kinds == 0]) == {COLOURS.index("cyan")}
    assert abs(int((kinds == KINDS.index("star") + 1).sum()) - np.pi * 9) <= 3  # radius of 3 cells
    assert kinds.max() < MAP_CLASSES[0]
    assert colours.max() < MAP_CLASSES[1]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(3)
    return networks.autoencoder().eval()


def test_whitening_changes_latents_and_not_pictures(vae: AutoencoderKL) -> None:
    random = np.random.default_rng(5)
    pictures = as_batch([draw_scene(random) for _ in range(12)])
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        painted = vae.decode(before.mean).sample
        whiten(vae, before.mean)
        after = vae.encode(pictures).latent_dist
        again = vae.decode(after.mean).sample
    torch.testing.assert_close(again, painted, rtol=1e-3, atol=1e-4)
    assert vae.config.scaling_factor == SCALING
    rows = (after.mean * SCALING).permute(1, 0, 2, 3).reshape(4, -1).double()
    torch.testing.assert_close(rows.mean(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-3)
    wanted = torch.diag(torch.tensor([FAINT**2, 1.0, 1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(rows.cov(), wanted, rtol=0, atol=5e-3)
    assert not torch.allclose(before.mean, after.mean)


def test_cutting_leaves_the_denoising_channels() -> None:
    torch.manual_seed(0)
    unet = networks.unet(extra_channels=7).eval()
    inputs = torch.randn(2, 4, 16, 16), 500, torch.randn(2, 77, networks.TEXT_WIDTH)
    with torch.no_grad():
        whole = unet(*inputs).sample
        networks.cut_extra_channels(unet)
        cut = unet(*inputs).sample
    assert whole.shape[1] == 11
    torch.testing.assert_close(cut, whole[:, :4])
    assert unet.config.out_channels == 4
    assert unet.state_dict().keys() == networks.unet().state_dict().keys()


def test_a_pool_is_made_once(tmp_path: Path, vae: AutoencoderKL) -> None:
    random = np.random.default_rng(2)
    tokenizer = networks.train_tokenizer(
        [caption(draw_scene(random), random) for _ in range(1500)], tmp_path / "tokenizer"
    )
    torch.manual_seed(1)
    encoder = networks.text_encoder(tokenizer).eval()

    def make(count: int) -> Pool:
        return make_pool(tmp_path / "pool.pt", 7, (192, 128), count, tokenizer, encoder, vae)

    pool = make(5)
    assert pool.latents.shape == (5, 4, 16, 24)
    assert pool.states.shape == (5, CAPTIONS, 77, networks.TEXT_WIDTH)
    assert pool.maps.shape == (5, 2, 16, 24)
    assert pool.nothing.shape == (77, networks.TEXT_WIDTH)
    stream = generator(6, 7, 192, 128)
    scenes = [draw_split(stream, False, 192, 128) for _ in range(5)]
    with torch.no_grad():
        wanted = vae.encode(as_batch(scenes)).latent_dist.mean * vae.config.scaling_factor
    assert (pool.latents.float() - wanted).norm() < 0.1 * wanted.norm()  # encoded in bf16
    np.testing.assert_array_equal(pool.maps, np.stack([class_maps(scene) for scene in scenes]))
    assert torch.equal(make(9).latents, pool.latents)  # read, not made again
    assert not list(tmp_path.glob("*.partial"))
