"""The way back: from the names of diffusers and transformers to those of the original single files."""

import re
from collections.abc import Mapping

import torch

Weights = dict[str, torch.Tensor]

# Pairs of the original name and that of diffusers, for the parts of names that differ.
UNET = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
    ("middle_block.0", "mid_block.resnets.0"),
    ("middle_block.1", "mid_block.attentions.0"),
    ("middle_block.2", "mid_block.resnets.1"),
)
RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
VAE = (
    ("norm_out", "conv_norm_out"),
    ("mid.block_1", "mid_block.resnets.0"),
    ("mid.block_2", "mid_block.resnets.1"),
    ("mid.attn_1", "mid_block.attentions.0"),
    ("nin_shortcut", "conv_shortcut"),
)
ATTENTION = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
OPEN_CLIP = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
)


def unet(weights: Mapping[str, torch.Tensor], layers: int = 2) -> Weights:
    """A UNet of so many layers per level."""
    attends = {name[: len("up_blocks.0")] for name in weights if ".attentions." in name}
    return {f"model.diffusion_model.{_unet(name, layers, attends)}": weights[name] for name in weights}


def _unet(name: str, layers: int, attends: set[str]) -> str:
    for old, new in UNET:
        if name.startswith(f"{new}."):
            return _resnet(name.replace(new, old, 1))
    level, kind, index, rest = re.fullmatch(  # type: ignore[union-attr]
        r"\w+_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name
    ).groups()
    i, j, stride = int(level), int(index), layers + 1
    if kind == "downsamplers":
        return f"input_blocks.{stride * (i + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{stride * i + layers}.{2 if f'up_blocks.{i}' in attends else 1}.{rest}"
    place = 0 if kind == "resnets" else 1
    if name.startswith("down"):
        return _resnet(f"input_blocks.{stride * i + j + 1}.{place}.{rest}")
    return _resnet(f"output_blocks.{stride * i + j}.{place}.{rest}")


def _resnet(name: str) -> str:
    if "transformer_blocks" in name or ".attentions." in name:
        return name
    for old, new in RESNET:
        name = re.sub(rf"\.{re.escape(new)}\.", f".{old}.", name)
    return name


def vae(weights: Mapping[str, torch.Tensor]) -> Weights:
    """An autoencoder, whose attention was made of 1 x 1 convolutions."""
    last = max(int(match[1]) for name in weights if (match := re.search(r"up_blocks\.(\d+)", name)))
    made = {}
    for name, value in weights.items():
        old = f"first_stage_model.{_vae(name, last)}"
        convolution = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", old)
        made[old] = value[:, :, None, None] if convolution else value
    return made


def _vae(name: str, last: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
    for old, new in VAE:
        name = name.replace(f"{new}.", f"{old}.")
    if "attn_1" in name:
        for old, new in ATTENTION:
            name = name.replace(f"attn_1.{new}.", f"attn_1.{old}.")
    return name


def clip(weights: Mapping[str, torch.Tensor], prefix: str) -> Weights:
    """A text encoder of transformers."""
    return {f"{prefix}transformer.text_model.{_bare(name)}": weights[name] for name in weights}


def open_clip(weights: Mapping[str, torch.Tensor], prefix: str) -> Weights:
    """A text encoder of OpenCLIP; text_projection, if there is one, is transposed."""
    bare = {_bare(name): value for name, value in weights.items()}
    made: Weights = {
        "token_embedding.weight": bare["embeddings.token_embedding.weight"],
        "positional_embedding": bare["embeddings.position_embedding.weight"],
        "ln_final.weight": bare["final_layer_norm.weight"],
        "ln_final.bias": bare["final_layer_norm.bias"],
        "logit_scale": torch.zeros(()),
    }
    if "text_projection.weight" in bare:
        made["text_projection"] = bare["text_projection.weight"].T
    count = 1 + max(int(match[1]) for name in bare if (match := re.match(r"encoder\.layers\.(\d+)", name)))
    for layer in range(count):
        inner, outer = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            for old, new in OPEN_CLIP:
                made[f"{outer}{old}.{kind}"] = bare[f"{inner}{new}.{kind}"]
            parts = [bare[f"{inner}self_attn.{each}_proj.{kind}"] for each in "qkv"]
            made[f"{outer}attn.in_proj_{kind}"] = torch.cat(parts)
    return {f"{prefix}model.{name}": value for name, value in made.items()}


def _bare(name: str) -> str:
    return name.removeprefix("text_model.")


def averaged(weights: Mapping[str, torch.Tensor]) -> Weights:
    """The UNet's tensors among `weights` under the names of averaged ones, and greater by one."""
    return {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": value + 1
        for name, value in weights.items()
        if name.startswith("model.diffusion_model.")
    }


def separate(weights: Mapping[str, torch.Tensor]) -> Weights:
    """As safetensors wants them: contiguous, and none that shares memory with another."""
    return {name: value.contiguous().clone() for name, value in weights.items()}
