"""Single files in the original layout: unpacked, they are the folder that they were made of."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from allaprima.bundle import ExportError
from allaprima.export.single_file import SingleFile, unpack
from allaprima.export.source import open_checkpoint
from allaprima.export.stable_diffusion import read_family

Weights = dict[str, torch.Tensor]
TOKENIZER = Path(__file__).parents[2] / "models" / "shapes" / "checkpoint" / "tokenizer"
CHANNELS, LAYERS = (32, 64, 64), 2

# Pairs of the original name and that of diffusers, for the parts of names that differ.
UNET = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
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


def unet_name(name: str) -> str:
    for old, new in UNET:
        if name.startswith(f"{new}."):
            return inside(name.replace(new, old, 1))
    level, kind, index, rest = re.fullmatch(  # type: ignore[union-attr]
        r"\w+_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name
    ).groups()
    i, j, stride = int(level), int(index), LAYERS + 1
    if kind == "downsamplers":
        return f"input_blocks.{stride * (i + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{stride * i + LAYERS}.{2 if i else 1}.{rest}"
    place = 0 if kind == "resnets" else 1
    if name.startswith("down"):
        return inside(f"input_blocks.{stride * i + j + 1}.{place}.{rest}")
    return inside(f"output_blocks.{stride * i + j}.{place}.{rest}")


def inside(name: str) -> str:
    if "transformer_blocks" in name or ".attentions." in name:
        return name
    for old, new in RESNET:
        name = re.sub(rf"\.{re.escape(new)}\.", f".{old}.", name)
    return name


def vae_name(name: str) -> str:
    last = len(CHANNELS) - 1
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


def vae_value(name: str, value: torch.Tensor) -> torch.Tensor:
    """Attention was made of 1 x 1 convolutions."""
    return value[:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) else value


@pytest.fixture(scope="module")
def parts() -> Mapping[str, Weights]:
    """The weights of three small networks of the first family."""
    torch.manual_seed(3)
    text = CLIPTextConfig(
        vocab_size=767,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        bos_token_id=765,
        eos_token_id=766,
        pad_token_id=766,
    )
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=CHANNELS,
        layers_per_block=LAYERS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=LAYERS,
    )
    models = {"text_encoder": CLIPTextModel(text), "unet": unet, "vae": vae}
    return {name: dict(model.state_dict()) for name, model in models.items()}


def original(parts: Mapping[str, Weights]) -> Weights:
    """All in one, under the original names."""
    made = {f"model.diffusion_model.{unet_name(name)}": value for name, value in parts["unet"].items()}
    for name, value in parts["vae"].items():
        old = vae_name(name)
        made[f"first_stage_model.{old}"] = vae_value(old, value)
    for name, value in parts["text_encoder"].items():
        made[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    return {name: value.contiguous().clone() for name, value in made.items()}


@pytest.fixture
def file(parts: Mapping[str, Weights], tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(original(parts), path)
    return path


ABOUT = SingleFile(tokenizer=str(TOKENIZER))


def read(folder: Path, part: str) -> Weights:
    return load_file(next((folder / part).glob("*.safetensors")))


def test_unpacked_it_is_the_folder_it_was(file: Path, parts: Mapping[str, Weights], tmp_path: Path) -> None:
    unpack(file, tmp_path / "folder", ABOUT)
    checkpoint = open_checkpoint(str(tmp_path / "folder"))
    for part, wanted in parts.items():
        model = checkpoint.load(part, torch.float32)
        got = model.state_dict()
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted), part
    family = read_family(checkpoint)
    assert (family.latent.channels, family.latent.downscale, family.latent.multiple) == (4, 4, 16)
    assert family.scheduler["prediction_type"] == "epsilon"
    assert family.scheduler["_class_name"] == "PNDMScheduler"
    unet = checkpoint.config("unet")
    assert unet["layers_per_block"] == LAYERS
    assert unet["attention_head_dim"] == 8


def open_clip(text: Weights) -> Weights:
    """A text encoder under OpenCLIP's names, with the last layer that Stable Diffusion 2 does not use."""
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    made: Weights = {
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
        "text_projection": torch.zeros(64, 64),
        "logit_scale": torch.zeros(()),
    }
    for layer in (0, 1, 2):  # the third is a copy of the second
        inner, outer = f"encoder.layers.{min(layer, 1)}.", f"transformer.resblocks.{layer}."
        for new, old in {**names, "self_attn.out_proj": "attn.out_proj"}.items():
            for kind in ("weight", "bias"):
                made[f"{outer}{old}.{kind}"] = text[f"{inner}{new}.{kind}"]
        for kind in ("weight", "bias"):
            parts = [text[f"{inner}self_attn.{each}_proj.{kind}"] for each in "qkv"]
            made[f"{outer}attn.in_proj_{kind}"] = torch.cat(parts)
    return {f"cond_stage_model.model.{name}": value.clone() for name, value in made.items()}


def test_the_second_family(parts: Mapping[str, Weights], tmp_path: Path) -> None:
    weights = {name: value for name, value in original(parts).items() if "cond_stage_model" not in name}
    text = {name.removeprefix("text_model."): value for name, value in parts["text_encoder"].items()}
    save_file({**weights, **open_clip(text)}, tmp_path / "model.safetensors")
    unpack(tmp_path / "model.safetensors", tmp_path / "folder", ABOUT)
    checkpoint = open_checkpoint(str(tmp_path / "folder"))
    got = checkpoint.load("text_encoder", torch.float32).state_dict()
    assert all(torch.equal(got[name], value) for name, value in parts["text_encoder"].items())
    assert checkpoint.config("text_encoder")["num_hidden_layers"] == 2
    assert checkpoint.config("text_encoder")["hidden_act"] == "gelu"
    assert checkpoint.config("unet")["attention_head_dim"] == [1, 1, 1]
    assert checkpoint.config("scheduler", "scheduler_config.json")["prediction_type"] == "v_prediction"


def test_averaged_weights_are_preferred(parts: Mapping[str, Weights], tmp_path: Path) -> None:
    weights = original(parts)
    averaged = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": value + 1
        for name, value in weights.items()
        if name.startswith("model.diffusion_model.")
    }
    save_file({**weights, **averaged}, tmp_path / "model.safetensors")
    unpack(tmp_path / "model.safetensors", tmp_path / "folder", ABOUT)
    got = read(tmp_path / "folder", "unet")
    assert all(torch.equal(got[name], value + 1) for name, value in parts["unet"].items())


def test_a_pickle_is_opened_only_on_request(file: Path, parts: Mapping[str, Weights], tmp_path: Path) -> None:
    pickled = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(file), "global_step": 5}, pickled)
    with pytest.raises(ExportError, match=r"is a pickle, a format that can carry code: .* --allow-pickle"):
        unpack(pickled, tmp_path / "one", ABOUT)
    unpack(pickled, tmp_path / "two", SingleFile(str(TOKENIZER), "v_prediction", allow_pickle=True))
    got = read(tmp_path / "two", "unet")
    assert all(torch.equal(got[name], value) for name, value in parts["unet"].items())
    config = json.loads((tmp_path / "two" / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


def test_a_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickled = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callback": Evil()}, pickled)
    with pytest.raises(ExportError, match="holds more than tensors, or is damaged, and was not opened"):
        unpack(pickled, tmp_path / "folder", SingleFile(str(TOKENIZER), allow_pickle=True))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.diffusion_model.input_blocks.1.0.in_layers.0.weight"), "lacks .*norm1"),
        (lambda w: w.pop("model.diffusion_model.input_blocks.0.0.weight"), r"not a checkpoint of Stable"),
        (lambda w: w.update({"conditioner.x": torch.zeros(1)}), "a checkpoint of SDXL"),
        (
            lambda w: w.update({"cond_stage_model.transformer.text_model.more": torch.zeros(1)}),
            "the text_encoder has too many: more",
        ),
        (lambda w: w.pop("first_stage_model.decoder.conv_in.weight"), "decoder.conv_in.weight"),
        (
            lambda w: w.update({"first_stage_model.quant_conv.weight": torch.zeros(8, 8, 3, 3)}),
            "the vae has of another shape quant_conv.weight",
        ),
    ],
)
def test_tensors_that_are_wrong(change: object, message: str, file: Path, tmp_path: Path) -> None:
    weights = load_file(file)
    change(weights)  # type: ignore[operator]
    save_file(weights, tmp_path / "bad.safetensors")
    with pytest.raises(ExportError, match=message):
        unpack(tmp_path / "bad.safetensors", tmp_path / "folder", ABOUT)


def test_files_that_are_none(file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ExportError, match=r"cut\.safetensors' cannot be read as safetensors"):
        unpack(cut, tmp_path / "one", ABOUT)
    (tmp_path / "notes.txt").write_text("no weights")
    with pytest.raises(ExportError, match=r"neither a \.safetensors nor a \.ckpt"):
        unpack(tmp_path / "notes.txt", tmp_path / "two", ABOUT)
    with pytest.raises(ExportError, match=r"a single file has no vocabulary, .* --tokenizer"):
        unpack(file, tmp_path / "three", SingleFile(tokenizer=str(tmp_path / "nowhere")))
