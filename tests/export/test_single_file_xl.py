"""Single files of SDXL and its refiner: unpacked, they are the folders that they were made of."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from allaprima.bundle import ExportError
from allaprima.export import networks, single_file
from allaprima.export.layouts import find_release
from allaprima.export.single_file import SingleFile, unpack

from . import original

Weights = dict[str, torch.Tensor]
Models = Mapping[str, Any]
TOKENIZER = Path(__file__).parents[2] / "models" / "shapes" / "checkpoint" / "tokenizer"
ABOUT = SingleFile(tokenizer=str(TOKENIZER))
PROMPTS = ["a red circle", "a blue square!! above"]

VAE = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
BASE = {
    "sample_size": 128,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (1, 1, 2),
    "cross_attention_dim": 64 + 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 96 + 6 * 256,
}
REFINER = {
    **BASE,
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 2,
    "attention_head_dim": (1, 1, 1, 1),
    "cross_attention_dim": 128,
    "projection_class_embeddings_input_dim": 96 + 5 * 256,
}


def text_config(width: int, projection: int, **others: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=767,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=width // 64,
        projection_dim=projection,
        bos_token_id=765,
        eos_token_id=766,
        **others,
    )


def make(unet: Mapping[str, Any]) -> dict[str, Any]:
    """Small models whose weights are all random, those that usually begin as zeros or ones too."""
    torch.manual_seed(5)
    second = text_config(128, 96, hidden_act="gelu", pad_token_id=0)
    models = {
        "text_encoder": CLIPTextModel(text_config(64, 64, pad_token_id=766)),
        "text_encoder_2": CLIPTextModelWithProjection(second),
        "unet": UNet2DConditionModel(**unet),
        "vae": AutoencoderKL(**VAE),
    }
    with torch.no_grad():
        for model in models.values():
            for weight in model.eval().parameters():
                weight.add_(0.02 * torch.randn_like(weight))
    return models


@pytest.fixture(scope="module")
def base() -> Models:
    return make(BASE)


@pytest.fixture(scope="module")
def refiner() -> Models:
    models = make(REFINER)
    del models["text_encoder"]
    return models


def as_one(models: Models) -> Weights:
    """All in one, under the original names."""
    states = {part: model.state_dict() for part, model in models.items()}
    weights = {**original.unet(states["unet"]), **original.vae(states["vae"])}
    if "text_encoder" in states:
        weights |= original.clip(states["text_encoder"], "conditioner.embedders.0.")
        weights |= original.open_clip(states["text_encoder_2"], "conditioner.embedders.1.")
    else:
        weights |= original.open_clip(states["text_encoder_2"], "conditioner.embedders.0.")
    return original.separate(weights)


def unpacked(weights: Weights, folder: Path, about: SingleFile = ABOUT) -> Path:
    """The folder of a file that is made of the weights."""
    save_file(weights, folder / "model.safetensors")
    unpack(folder / "model.safetensors", folder / "unpacked", about)
    return folder / "unpacked"


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def public(config: Mapping[str, Any]) -> Any:
    """A configuration as it is in a file, without what says where and by what it was written."""
    kept = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.loads(json.dumps({**kept, "dtype": None, "torch_dtype": None, "architectures": None}))


def assert_same(got: Any, models: Models) -> None:
    """A pipeline's models are those, in every tensor and every field."""
    for part, wanted in models.items():
        model = getattr(got, part)
        assert type(model) is type(wanted)
        tensors = model.state_dict()
        assert tensors.keys() == wanted.state_dict().keys()
        assert all(torch.equal(tensors[name], value) for name, value in wanted.state_dict().items()), part
        configs = [
            each.config if part in ("unet", "vae") else each.config.to_dict() for each in (model, wanted)
        ]
        assert public(configs[0]) == public(configs[1]), part


def tokenizers() -> dict[str, CLIPTokenizer]:
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(TOKENIZER),
        "tokenizer_2": CLIPTokenizer.from_pretrained(TOKENIZER, pad_token="!"),
    }


def load(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder, local_files_only=True, add_watermarker=False)


def test_base_is_the_folder_it_was(base: Models, tmp_path: Path) -> None:
    folder = unpacked(as_one(base), tmp_path)
    got = load(StableDiffusionXLPipeline, folder)
    assert_same(got, base)
    index = read(folder / "model_index.json")
    assert index == {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "add_watermarker": None,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    assert {path.name for path in folder.iterdir() if path.is_dir()} == index.keys() - {
        *("_class_name", "force_zeros_for_empty_prompt", "add_watermarker")
    }
    assert isinstance(got.scheduler, EulerDiscreteScheduler)
    wanted = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    wanted |= {"prediction_type": "epsilon", "timestep_spacing": "leading", "interpolation_type": "linear"}
    wanted |= {"use_karras_sigmas": False, "rescale_betas_zero_snr": False, "num_train_timesteps": 1000}
    assert wanted.items() <= dict(got.scheduler.config).items()


@torch.no_grad()
def test_base_says_and_does_the_same(base: Models, tmp_path: Path) -> None:
    """Hidden states and pooled vectors of both encoders, and a step of the UNet that takes them."""
    got = load(StableDiffusionXLPipeline, unpacked(as_one(base), tmp_path))
    wanted = StableDiffusionXLPipeline(
        **base, **tokenizers(), scheduler=EulerDiscreteScheduler(), add_watermarker=False
    )
    ids = [pipeline.tokenizer_2(PROMPTS, padding=True).input_ids for pipeline in (got, wanted)]
    assert ids[0] == ids[1]
    assert ids[0][0][-1] == 0  # padded with "!"
    assert got.tokenizer(PROMPTS, padding=True).input_ids[0][-1] == 766
    states = [pipeline.encode_prompt(PROMPTS, negative_prompt=["grey", ""]) for pipeline in (got, wanted)]
    assert [tuple(each.shape) for each in states[0]] == [(2, 77, 192)] * 2 + [(2, 96)] * 2
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))
    text, _, pooled, _ = states[0]
    assert pooled.std() > 0.1
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    sample = torch.randn(2, 4, 16, 16)
    outputs = [
        each.unet(sample, 500, text, added_cond_kwargs=conditions, return_dict=False)[0]
        for each in (got, wanted)
    ]
    assert torch.equal(*outputs)


@torch.no_grad()
def test_refiner_is_the_folder_it_was(refiner: Models, tmp_path: Path) -> None:
    folder = unpacked(as_one(refiner), tmp_path)
    got = load(StableDiffusionXLImg2ImgPipeline, folder)
    assert_same(got, refiner)
    index = read(folder / "model_index.json")
    assert index["_class_name"] == "StableDiffusionXLImg2ImgPipeline"
    assert index["text_encoder"] == index["tokenizer"] == [None, None]
    assert (got.text_encoder, got.tokenizer, got.tokenizer_2.pad_token_id) == (None, None, 0)
    assert got.config.requires_aesthetics_score is True
    assert got.config.force_zeros_for_empty_prompt is False
    assert not (folder / "text_encoder").exists()
    wanted = StableDiffusionXLImg2ImgPipeline(
        **refiner,
        **{**tokenizers(), "tokenizer": None},
        text_encoder=None,
        scheduler=EulerDiscreteScheduler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    states = [pipeline.encode_prompt(PROMPTS) for pipeline in (got, wanted)]
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))


def test_inpainting_takes_nine_channels(tmp_path: Path) -> None:
    models = make({**BASE, "in_channels": 9})
    folder = unpacked(as_one(models), tmp_path)
    assert read(folder / "unet" / "config.json")["in_channels"] == 9
    assert_same(load(StableDiffusionXLInpaintPipeline, folder), models)
    assert read(folder / "model_index.json")["_class_name"] == "StableDiffusionXLInpaintPipeline"


@pytest.mark.parametrize(
    ("marks", "prediction", "wanted"),
    [
        (["v_pred"], None, ("v_prediction", False, "leading")),
        (["v_pred", "ztsnr"], None, ("v_prediction", True, "trailing")),
        (["ztsnr"], "v_prediction", ("v_prediction", True, "trailing")),
        # Noise alone holds nothing that a prediction of the noise could start from.
        (["v_pred", "ztsnr"], "epsilon", ("epsilon", False, "leading")),
        (["ztsnr"], None, ("epsilon", False, "leading")),
    ],
)
def test_marks_of_v_prediction(
    base: Models, marks: list[str], prediction: str | None, wanted: tuple[str, bool, str], tmp_path: Path
) -> None:
    weights = as_one(base) | {name: torch.zeros(0) for name in marks}
    folder = unpacked(weights, tmp_path, SingleFile(str(TOKENIZER), prediction))
    config = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler").config
    assert (config.prediction_type, config.rescale_betas_zero_snr, config.timestep_spacing) == wanted


def test_averaged_weights_are_preferred(base: Models, tmp_path: Path) -> None:
    weights = as_one(base)
    folder = unpacked({**weights, **original.averaged(weights)}, tmp_path)
    got = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(got[name], value + 1) for name, value in base["unet"].state_dict().items())


def as_transformers(weights: Weights, prefix: str, models: Models) -> Weights:
    """Encoder 2 under the names of transformers."""
    kept = {name: value for name, value in weights.items() if "embedders.1." not in name}
    state = models["text_encoder_2"].state_dict()
    return kept | {f"conditioner.embedders.1.{prefix}{name}": value.clone() for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["model.", "model.transformer.", "transformer."])
def test_second_encoder_under_the_names_of_transformers(base: Models, prefix: str, tmp_path: Path) -> None:
    folder = unpacked(as_transformers(as_one(base), prefix, base), tmp_path)
    assert_same(load(StableDiffusionXLPipeline, folder), base)


def test_tensors_that_tell_nothing(base: Models, tmp_path: Path) -> None:
    """Text tensors twice over, positions as numbers, and what only training used."""
    first, second = "conditioner.embedders.0.", "conditioner.embedders.1.model."
    extra = {
        f"{second}transformer.text_model.embeddings.position_ids": torch.arange(77),
        f"{second}text_model.final_layer_norm.weight": torch.zeros(128),
        f"{first}transformer.text_model.embeddings.position_ids": torch.arange(77),
        f"{first}transformer.text_projection.weight": torch.zeros(64, 64),
        f"{first}logit_scale": torch.zeros(()),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "alphas_cumprod": torch.zeros(1000),
        "model_ema.decay": torch.zeros(()),
    }
    folder = unpacked(as_one(base) | extra, tmp_path)
    assert_same(load(StableDiffusionXLPipeline, folder), base)


Change = Callable[[Weights], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("conditioner.embedders.1.model.text_projection"),
            r"model\.safetensors': the checkpoint lacks the tensor text_projection\.weight",
        ),
        (
            lambda w: w.pop("conditioner.embedders.1.model.transformer.resblocks.1.ln_1.bias"),
            r"the text_encoder_2 lacks text_model\.encoder\.layers\.1\.layer_norm1\.bias",
        ),
        (
            lambda w: w.pop("conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias"),
            r"the text_encoder_2 lacks .*self_attn\.k_proj\.bias, .*q_proj\.bias, .*v_proj\.bias",
        ),
        (
            lambda w: w.update({"conditioner.embedders.1.model.visual.proj": torch.zeros(4)}),
            r"the text_encoder_2 has too many: conditioner\.embedders\.1\.model\.visual\.proj",
        ),
        (
            lambda w: [w.pop(name) for name in list(w) if name.startswith("conditioner.embedders.0.")],
            r"lacks the tensor embeddings\.token_embedding\.weight",
        ),
        (
            lambda w: [w.pop(name) for name in list(w) if name.startswith("conditioner.embedders.1.")],
            "has no text encoder that is known here",
        ),
        (
            lambda w: w.pop("model.diffusion_model.label_emb.0.0.weight"),
            r"lacks the tensor model\.diffusion_model\.label_emb\.0\.0\.weight",
        ),
        (
            lambda w: w.update(
                {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(128, 96 + 7 * 256)}
            ),
            "label_emb takes 1888 numbers, not the 96 of the pooled prompt and 256 each for 6 others",
        ),
        (
            lambda w: w.pop("model.diffusion_model.middle_block.1.transformer_blocks.2.norm1.bias"),
            r"the unet lacks mid_block\.attentions\.0\.transformer_blocks\.2\.norm1\.bias",
        ),
        (
            lambda w: w.update({"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(4, 4)}),
            r"the unet has too many: model\.diffusion_model\.time_embed\.cond_proj\.weight",
        ),
        (lambda w: w.update({"edm_vpred.sigma_max": torch.zeros(())}), r"EDM kind .*edm_vpred\.sigma_max"),
    ],
)
def test_tensors_that_are_wrong(base: Models, change: Change, message: str, tmp_path: Path) -> None:
    weights = as_one(base)
    change(weights)
    with pytest.raises(ExportError, match=message):
        unpacked(weights, tmp_path)


def test_pickles_are_refused(base: Models, tmp_path: Path) -> None:
    torch.save({"state_dict": as_one(base)}, tmp_path / "model.ckpt")
    with pytest.raises(ExportError, match="is a pickle, a format that can carry code"):
        unpack(tmp_path / "model.ckpt", tmp_path / "one", ABOUT)
    unpack(tmp_path / "model.ckpt", tmp_path / "two", SingleFile(str(TOKENIZER), allow_pickle=True))
    assert_same(load(StableDiffusionXLPipeline, tmp_path / "two"), base)


def test_tokenizer_of_another_vocabulary(base: Models, tmp_path: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ExportError, match="has 768 tokens, that of the text_encoder 767: name the folder"):
        unpacked(as_one(base), tmp_path, SingleFile(str(tmp_path / "tokenizer")))


def test_full_disk(base: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = as_one(base)
    left = sum(value.nbytes for value in weights.values()) - 1
    monkeypatch.setattr(single_file.shutil, "disk_usage", lambda _: SimpleNamespace(free=left))
    with pytest.raises(ExportError, match=r"needs 0\.1 GB for a while in '.*', which has 0\.1 GB left"):
        unpacked(weights, tmp_path)
    assert not (tmp_path / "unpacked").exists()
    left += 1
    assert unpacked(weights, tmp_path).is_dir()


PUBLISHED = {
    "base": (
        "conditioner.embedders.1.model.ln_final.bias",
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "projection_class_embeddings_input_dim": 2816,
        },
        2_567_463_684,
    ),
    "refiner": (
        "conditioner.embedders.0.model.ln_final.bias",
        {
            "block_out_channels": [384, 768, 1536, 1536],
            "down_block_types": [
                *("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            ],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": 4,
            "attention_head_dim": [6, 12, 24, 24],
            "cross_attention_dim": 1280,
            "projection_class_embeddings_input_dim": 2560,
        },
        2_259_526_660,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name: str) -> None:
    """Read off the shapes of the published UNets, without memory for them."""
    sign, differing, size = PUBLISHED[name]
    config = {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "use_linear_projection": True,
        "norm_num_groups": 32,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        **differing,
    }
    with torch.device("meta"):
        state = UNet2DConditionModel(**config).state_dict()
        weights = original.unet(state) | {sign: torch.zeros(1280)}
    assert sum(value.numel() for value in state.values()) == size
    got = networks.read_unet(weights, find_release(Path("model.safetensors"), weights))
    assert got == {"_class_name": "UNet2DConditionModel", **config}
