"""Train `shapes`: text encoder, autoencoder, UNet, then write the diffusers folder.

Run `python -m allaprima.models.shapes.train --work build/training --out models/shapes/checkpoint`.
Each stage resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from allaprima.models.shapes import networks
from allaprima.models.shapes.autoencoder import sharpen, train_autoencoder
from allaprima.models.shapes.captions import CLASSES, NOTHING, Labels, caption, labels
from allaprima.models.shapes.pool import CAPTIONS, MAP_CLASSES, Pool, make_pool, token_ids
from allaprima.models.shapes.scenes import CANVASES, draw_split
from allaprima.models.shapes.training import SEED, Plan, Stage, autocast, device, generator

EMPTY_SHARE = 0.1
READ_AT = (76, 76, 75, 75, 75, 74, 74, 74, 76)
"""Token position from which each label is read: the last three, which see the whole caption."""
CANVAS_SHARES = (0.7, 0.15, 0.15)
DEFAULTS = {"num_inference_steps": 20, "guidance_scale": 2.0}
"""Painted with unless a request says otherwise; `allaprima export` puts them into the bundle."""
POOL = (32_000, 6_000, 6_000)
SHARPEN = 3000
"""Steps of the decoder alone, at the end."""


def draw_captions(random: np.random.Generator, count: int) -> tuple[list[str], list[Labels]]:
    """Fresh training captions with their labels, a tenth of them empty."""
    texts, facts = [], []
    for _ in range(count):
        scene = draw_split(random, held_out=False)
        empty = random.random() < EMPTY_SHARE
        texts.append("" if empty else caption(scene, random))
        facts.append(NOTHING if empty else labels(scene))
    return texts, facts


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


def train_unet(work: Path, pools: list[Pool], plan: Plan, until: int | None) -> UNet2DConditionModel:
    """Learn to denoise (v prediction), high noise a little more often, where the composition is decided.

    Extra output channels must also say which shape and which colour each cell belongs to, at first with much
    weight: what the caption says about a place is learned from that long before it shows in the noise. They
    are cut off at the end.
    """
    torch.manual_seed(SEED)
    unet = networks.unet(extra_channels=sum(MAP_CLASSES)).to(device(), memory_format=torch.channels_last)
    # On a CPU plain attention takes half the time of the fused one, whose backward pass is slow. Do not
    # compile: under autocast on a CPU, torch 2.13 compiles a backward pass without most gradients.
    unet.set_attn_processor(AttnProcessor())
    stage = Stage(work / "unet", unet, plan)
    schedule = DDIMScheduler.from_config(networks.SCHEDULER)

    def loss_of(step: int) -> torch.Tensor:
        random = generator(8, SEED, step)
        torch.manual_seed(step)
        pool = pools[int(random.choice(3, p=CANVAS_SHARES))]
        count = 64 * 256 // pool.latents[0, 0].numel()
        rows = torch.from_numpy(random.integers(0, len(pool.latents), count))
        wordings = torch.from_numpy(random.integers(0, CAPTIONS, count))
        states = pool.states[rows, wordings]
        states[torch.from_numpy(random.random(count) < EMPTY_SHARE)] = pool.nothing
        clean = pool.latents[rows].to(device()).float()
        times = torch.from_numpy((1000 * random.random(count) ** 0.75).astype(np.int64)).to(device())
        noise = torch.randn_like(clean)
        noisy = schedule.add_noise(clean, noise, times).contiguous(memory_format=torch.channels_last)
        with autocast():
            guess = unet(noisy, times, states.to(device()).float(), return_dict=False)[0]
        drawn, *named = guess.float().split((4, *MAP_CLASSES), 1)
        maps = pool.maps[rows].to(device()).long()
        naming = sum(functional.cross_entropy(logits, maps[:, k]) for k, logits in enumerate(named))
        weight = 0.1 * max(0.0, 1 - step / (0.7 * plan.steps))
        return functional.mse_loss(drawn, schedule.get_velocity(clean, noise, times)) + weight * naming

    stage.train(loss_of, until)
    stage.finish()
    networks.cut_extra_channels(unet)
    return unet


def write_checkpoint(
    out: Path,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
) -> None:
    """The diffusers folder, in fp16.

    The weights of UNet and autoencoder keep bf16's eight significant bits, which git packs a sixth smaller.
    """
    unet.bfloat16()
    vae.bfloat16()
    tokenizer.save_pretrained(out / "tokenizer")
    for name, model in (("text_encoder", encoder), ("vae", vae), ("unet", unet)):
        model.half().save_pretrained(out / name)
        config = out / name / "config.json"
        settings = json.loads(config.read_text())
        settings.pop("_name_or_path", None)  # a path of the machine that trained
        config.write_text(json.dumps(settings, indent=2) + "\n")
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


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in `folder`, trained first if it is not there."""
    if folder.exists():
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
        return tokenizer
    texts, _ = draw_captions(generator(9, SEED), 20_000)
    return networks.train_tokenizer(texts, folder)


def kept(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel, AutoencoderKL]:
    """Tokenizer, text encoder and autoencoder of a checkpoint, on the training device."""
    encoder: CLIPTextModel = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    return (
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        encoder.to(device()).eval(),  # type: ignore[arg-type]
        AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).to(device()).eval(),
    )


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
    parser.add_argument("--keep", type=Path, help="checkpoint whose text encoder and autoencoder are kept")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.keep:
        tokenizer, encoder, vae = kept(options.keep)
    else:
        tokenizer = train_tokenizer(options.work / "tokenizer")
        vae = train_autoencoder(options.work)
        encoder = train_text(options.work, tokenizer, options.text_steps)
    pools = [
        make_pool(options.work / f"pool-{k}.pt", SEED, canvas, count, tokenizer, encoder, vae)
        for k, (canvas, count) in enumerate(zip(CANVASES, POOL, strict=True))
    ]
    plan = Plan(options.unet_steps, 1e-3, warmup=200, cooldown=0.75, decay=0.999)
    unet = train_unet(options.work, pools, plan, options.until)
    vae = sharpen(options.work, vae, SHARPEN)
    write_checkpoint(options.out, tokenizer, encoder, vae, unet)


if __name__ == "__main__":
    main()
