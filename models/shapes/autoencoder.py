"""Train the autoencoder of `shapes` and give its latents a shape that is easy to denoise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from allaprima.models.shapes import networks
from allaprima.models.shapes.pool import as_batch, to_tensor
from allaprima.models.shapes.scenes import draw_split, render
from allaprima.models.shapes.training import SEED, Plan, Stage, autocast, device, generator, psnr

CROPS, WHOLE = 1300, 1600
"""Steps on crops, and in all."""
SCALING = 0.72957
"""`scaling_factor` in the configuration."""
FAINT = 0.4
"""Standard deviation of the weakest latent channel."""


def train_autoencoder(work: Path) -> AutoencoderKL:
    """Learn the latents: random 64-pixel crops first (it is convolutional), whole pictures at the end.

    Two starts save most of the time: residual branches begin at zero, and at first three latent channels are
    drawn to the mean colour of their 8 × 8 pixels (loss after 150 steps 0.29 with both, 0.50 without).
    """
    torch.manual_seed(SEED)
    vae = networks.autoencoder().to(device())
    for name, weight in vae.named_parameters():
        if ".conv2." in name:
            torch.nn.init.zeros_(weight)
    stage = Stage(
        work / "vae", vae, Plan(WHOLE, 3e-3, warmup=100, cooldown=0.5, decay=0.995, weight_decay=0.0)
    )

    def loss_of(step: int) -> torch.Tensor:
        random = generator(4, SEED, step)
        pictures = crops(random, 32, 64) if step < CROPS else crops(random, 16, 128)
        with autocast():
            posterior = vae.encode(pictures).latent_dist
            painted = vae.decode(posterior.sample()).sample
        error = painted.float() - pictures
        colours = functional.avg_pool2d(pictures, 8)
        hint = (posterior.mean[:, :3].float() - 2 * colours).square().mean()
        weight = max(0.02, 0.5 * (1 - step / 700))
        drawing = error.abs().mean() + error.square().mean()
        loss: torch.Tensor = drawing + weight * hint + 1e-6 * posterior.kl().mean()
        return loss

    stage.train(loss_of)
    stage.finish()
    with torch.no_grad():
        pictures = as_batch([draw_split(generator(5, SEED, k), held_out=True) for k in range(256)])
        latents = vae.encode(pictures).latent_dist.mean
        print(f"vae: {psnr(vae.decode(latents).sample, pictures):.2f} dB on held-out pictures")
    whiten(vae, latents)
    return vae


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Give `latents` (float32 [B, 4, H, W]) mean 0 and uncorrelated channels.

    The 1 × 1 convolutions around them are changed. As learned, brightness has 13 times the variance of the
    weakest colour direction, so noise would hide most colours until late. The three strong directions
    (colour) get variance 1; the weakest one, detail that the decoder hardly looks at, a standard deviation of
    `FAINT`. Pictures stay as they were.
    """
    rows = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).double()
    mean = rows.mean(0)
    variance, directions = torch.linalg.eigh((rows - mean).T.cov())
    scale = variance.rsqrt() / SCALING
    scale[0] *= FAINT
    forward, backward = scale[:, None] * directions.T, directions / scale
    into, out = vae.quant_conv, vae.post_quant_conv
    half = len(mean)
    weight, bias = into.weight.flatten(1).double(), into.bias.double()
    shares = forward.square() / forward.square().sum(1, keepdim=True)
    log_scale = forward.square().sum(1).log()
    into.weight.copy_(torch.cat([forward @ weight[:half], shares @ weight[half:]]).view_as(into.weight))
    into.bias.copy_(torch.cat([forward @ (bias[:half] - mean), shares @ bias[half:] + log_scale]))
    weight = out.weight.flatten(1).double()
    out.bias.add_(weight @ mean)
    out.weight.copy_((weight @ backward).view_as(out.weight))
    vae.register_to_config(scaling_factor=SCALING)


def sharpen(work: Path, vae: AutoencoderKL, steps: int) -> AutoencoderKL:
    """Teach the decoder finer outlines; the encoder, and so every latent, stays as it is.

    It learns on whole pictures, from latents a little off as a denoiser leaves them, with the pixels along
    outlines weighing five times as much as flat ones.
    """
    torch.manual_seed(SEED)
    vae.requires_grad_(False)
    vae.to(memory_format=torch.channels_last)
    drawing = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    plan = Plan(steps, 1e-3, warmup=50, cooldown=0.8, decay=0.99, weight_decay=0.0)
    stage = Stage(work / "decoder", drawing, plan)

    def loss_of(step: int) -> torch.Tensor:
        random = generator(10, SEED, step)
        torch.manual_seed(step)
        pictures = as_batch([draw_split(random, held_out=False) for _ in range(8)])
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        with autocast():
            with torch.no_grad():
                latents = vae.encode(pictures).latent_dist.mean
            painted = vae.decode(latents + 0.05 * torch.randn_like(latents)).sample
        error = painted.float() - pictures
        contrast = functional.max_pool2d(pictures, 5, 1, 2) + functional.max_pool2d(-pictures, 5, 1, 2)
        weight = 1 + 4 * (contrast.amax(1, keepdim=True) > 0.1).float()
        loss: torch.Tensor = (weight * (error.abs() + error.square())).mean()
        return loss

    stage.train(loss_of)
    stage.finish()
    return vae


def crops(random: np.random.Generator, count: int, side: int) -> torch.Tensor:
    """Random square crops of fresh scenes, float32 [count, 3, side, side] in [-1, 1]."""
    rows = []
    for _ in range(count):
        picture = render(draw_split(random, held_out=False))
        y, x = (int(random.integers(0, 128 - side + 1)) for _ in range(2))
        rows.append(picture[y : y + side, x : x + side])
    return to_tensor(np.stack(rows))
