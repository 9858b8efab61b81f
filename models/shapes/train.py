"""Train `shapes`: text encoder, autoencoder, UNet, then write the diffusers folder.

Run `python -m allaprima.models.shapes.train --work build/training --out models/shapes/checkpoint`.
Each stage resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from allaprima.models.shapes import networks
from allaprima.models.shapes.captions import CLASSES, NOTHING, Labels, caption, labels
from allaprima.models.shapes.scenes import CANVASES, Scene, draw_split, render
from allaprima.models.shapes.training import Plan, Stage, batches, device, generator, psnr

SEED = 7
EMPTY_SHARE = 0.1
READ_AT = (76, 76, 75, 75, 75, 74, 74, 74, 76)
"""Token position from which each label is read: the last three, which see the whole caption."""
CROPS, WHOLE = 1300, 1600
CANVAS_SHARES = (0.7, 0.15, 0.15)
DEFAULTS = {"num_inference_steps": 20, "guidance_scale": 5.0}
"""Painted with unless a request says otherwise; `allaprima export` puts them into the bundle."""
POOL = (36_000, 8_000, 8_000)


def autocast() -> torch.autocast:
    """bf16 matrix products; weights, sums and losses stay in float32."""
    return torch.autocast(device().type, torch.bfloat16)


def draw_captions(random: np.random.Generator, count: int) -> tuple[list[str], list[Labels]]:
    """Fresh training captions with their labels, a tenth of them empty."""
    texts, facts = [], []
    for _ in range(count):
        scene = draw_split(random, held_out=False)
        empty = random.random() < EMPTY_SHARE
        texts.append("" if empty else caption(scene, random))
        facts.append(NOTHING if empty else labels(scene))
    return texts, facts


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids int64 [B, 77] on the training device."""
    encoded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return torch.as_tensor(encoded.input_ids, device=device())


class Reader(torch.nn.Module):
    """The text encoder with one linear head per label; the heads are dropped after training."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = torch.nn.ModuleList(torch.nn.Linear(networks.TEXT_WIDTH, count) for count in CLASSES)

    def forward(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Logits per label for ids [B, 77]."""
        states = self.encoder(ids).last_hidden_state
        return [head(states[:, at]) for head, at in zip(self.heads, READ_AT, strict=True)]


def train_text(work: Path, tokenizer: CLIPTokenizer, steps: int) -> CLIPTextModel:
    """Teach the text encoder to say which thing has which colour, size and place.

    Without this, the UNet would have to learn the grammar from the denoising loss alone, which takes many
    times longer.
    """
    torch.manual_seed(SEED)
    reader = Reader(networks.text_encoder(tokenizer)).to(device())
    reader.encoder.set_attn_implementation("eager")  # twice as fast on a CPU, backward pass included
    stage = Stage(work / "text", reader, Plan(steps, 1.5e-3, warmup=100, cooldown=0.4, decay=0.99))

    def loss_of(step: int) -> torch.Tensor:
        texts, facts = draw_captions(generator(1, SEED, step), 64)
        wanted = torch.tensor([fact.flat() for fact in facts], device=device())
        with autocast():
            logits = reader(token_ids(tokenizer, texts))
        return torch.stack(
            [functional.cross_entropy(row.float(), wanted[:, k]) for k, row in enumerate(logits)]
        ).sum()

    stage.train(loss_of)
    stage.finish()
    with torch.no_grad():
        scenes = [draw_split(generator(2, SEED, k), held_out=True) for k in range(1000)]
        texts = [caption(scene, generator(3, SEED, k)) for k, scene in enumerate(scenes)]
        wanted = torch.tensor([labels(scene).flat() for scene in scenes], device=device())
        read = torch.stack([row.argmax(1) for row in reader(token_ids(tokenizer, texts))], 1)
        print(
            f"text: {(read == wanted).all(1).float().mean():.4f} of held-out captions read without a mistake"
        )
    return reader.encoder


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
        pictures = as_batch([draw_split(generator(5, SEED, k), held_out=True) for k in range(64)])
        latents = vae.encode(pictures).latent_dist.mean
        print(f"vae: {psnr(vae.decode(latents).sample, pictures):.2f} dB on held-out pictures")
        vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    return vae


def crops(random: np.random.Generator, count: int, side: int) -> torch.Tensor:
    """Random square crops of fresh scenes, float32 [count, 3, side, side] in [-1, 1]."""
    rows = []
    for _ in range(count):
        picture = render(draw_split(random, held_out=False))
        y, x = (int(random.integers(0, 128 - side + 1)) for _ in range(2))
        rows.append(picture[y : y + side, x : x + side])
    return to_tensor(np.stack(rows))


def as_batch(scenes: list[Scene]) -> torch.Tensor:
    """Rendered scenes of one size, float32 [B, 3, height, width] in [-1, 1]."""
    return to_tensor(np.stack([render(scene) for scene in scenes]))


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, height, width, 3] to float32 [B, 3, height, width] in [-1, 1]."""
    return torch.from_numpy(pictures).to(device()).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


@torch.no_grad()
def encode_pool(work: Path, vae: AutoencoderKL) -> list[tuple[list[Scene], torch.Tensor]]:
    """Scenes and their latents for each canvas, encoded once: encoding costs as much as a training step."""
    pool = []
    vae.to(memory_format=torch.channels_last)  # encodes 2.6 times as fast on a CPU
    for number, ((width, height), count) in enumerate(zip(CANVASES, POOL, strict=True)):
        random = generator(6, SEED, number)
        scenes = [draw_split(random, False, width, height) for _ in range(count)]
        file = work / f"latents-{width}x{height}.npy"
        if not file.exists():
            rows = []
            for part in batches(count, 64):
                pictures = as_batch(scenes[part]).contiguous(memory_format=torch.channels_last)
                with autocast():
                    mean = vae.encode(pictures).latent_dist.mean
                rows.append((mean.float() * vae.config.scaling_factor).half().cpu().numpy())
            partial = file.with_suffix(".partial.npy")
            np.save(partial, np.concatenate(rows))
            partial.replace(file)
        pool.append((scenes, torch.from_numpy(np.load(file))))
    return pool


def train_unet(
    work: Path,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    vae: AutoencoderKL,
    plan: Plan,
    until: int | None,
) -> UNet2DConditionModel:
    """Learn to denoise (v prediction), high noise a little more often, where the composition is decided."""
    torch.manual_seed(SEED)
    unet = networks.unet().to(device(), memory_format=torch.channels_last)
    # On a CPU plain attention takes half the time of the fused one, whose backward pass is slow;
    # compiling (two minutes for each picture size) takes half of that again.
    unet.set_attn_processor(AttnProcessor())
    compiled: Any = torch.compile(unet, dynamic=False)
    stage = Stage(work / "unet", unet, plan)
    pool = encode_pool(work, vae)
    schedule = DDIMScheduler.from_config(networks.SCHEDULER)
    encoder.requires_grad_(False)

    def loss_of(step: int) -> torch.Tensor:
        random = generator(8, SEED, step)
        torch.manual_seed(step)
        scenes, latents = pool[int(random.choice(3, p=CANVAS_SHARES))]
        count = 64 * 256 // (latents.shape[2] * latents.shape[3])
        rows = random.integers(0, len(scenes), count)
        texts = ["" if random.random() < EMPTY_SHARE else caption(scenes[row], random) for row in rows]
        clean = latents[torch.from_numpy(rows)].to(device()).float()
        times = torch.from_numpy((1000 * random.random(count) ** 0.75).astype(np.int64)).to(device())
        noise = torch.randn_like(clean)
        noisy = schedule.add_noise(clean, noise, times)
        target = schedule.get_velocity(clean, noise, times)
        with autocast():
            with torch.no_grad():
                states = encoder(token_ids(tokenizer, texts)).last_hidden_state.float()
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            guess = compiled(noisy, times, states, return_dict=False)[0]
        return functional.mse_loss(guess.float(), target)

    stage.train(loss_of, until)
    stage.finish()
    return unet


def write_checkpoint(
    out: Path,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
) -> None:
    """The diffusers folder, in fp16."""
    tokenizer.save_pretrained(out / "tokenizer")
    for name, model in (("text_encoder", encoder), ("vae", vae), ("unet", unet)):
        model.half().save_pretrained(out / name)
    DDIMScheduler.from_config(networks.SCHEDULER).save_pretrained(out / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")


def main() -> None:
    """Run the stages that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="states and logs")
    parser.add_argument(
        "--out", type=Path, default=Path("models/shapes/checkpoint"), help="the diffusers folder"
    )
    parser.add_argument("--text-steps", type=int, default=2000)
    parser.add_argument(
        "--unet-steps", type=int, default=8000, help="length of the plan; may change on resuming"
    )
    parser.add_argument("--until", type=int, help="stop the UNet at this step and write what there is")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if (options.work / "tokenizer").exists():
        tokenizer = CLIPTokenizer.from_pretrained(options.work / "tokenizer")
    else:
        texts, _ = draw_captions(generator(9, SEED), 20_000)
        tokenizer = networks.train_tokenizer(texts, options.work / "tokenizer")
    vae = train_autoencoder(options.work)
    encoder = train_text(options.work, tokenizer, options.text_steps)
    plan = Plan(options.unet_steps, 1e-3, warmup=200, cooldown=0.3, decay=0.9985)
    unet = train_unet(options.work, tokenizer, encoder, vae, plan, options.until)
    write_checkpoint(options.out, tokenizer, encoder, vae, unet)


if __name__ == "__main__":
    main()
