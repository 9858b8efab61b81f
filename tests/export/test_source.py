"""Checkpoints that cannot be exported are refused in one clear line, before anything of them is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from allaprima.bundle import ExportError
from allaprima.export import export_checkpoint
from allaprima.export.source import open_checkpoint
from allaprima.export.stable_diffusion import Family, read_family


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be broken."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "broken")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """No download ever starts; what would have been asked for."""
    asked: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append({"repo": repo, **options})
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def read(source: Path | str) -> Family:
    return read_family(open_checkpoint(str(source)))


def refuse(source: Path | str, message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        read(source)
    assert "\n" not in str(caught.value)


def edit(file: Path, **fields: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    value = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def test_facts_of_a_checkpoint(tiny_checkpoint: Path) -> None:
    family = read(tiny_checkpoint)
    assert (family.latent.channels, family.latent.downscale, family.latent.multiple) == (4, 8, 16)
    assert (family.defaults.height, family.defaults.width) == (128, 128)
    assert (family.defaults.num_inference_steps, family.defaults.guidance_scale) == (50, 7.5)
    assert (family.texts["text_encoder"].width, family.length) == (32, 77)
    assert family.scheduler["_class_name"] == "PNDMScheduler"
    assert (family.scheduler["steps_offset"], family.scheduler["clip_sample"]) == (1, False)
    assert family.scheduler["skip_prk_steps"] is True
    assert json.loads(json.dumps(family.scheduler)) == family.scheduler


def test_img2img_is_the_same_checkpoint(checkpoint: Path) -> None:
    edit(checkpoint / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline")
    assert read(checkpoint).latent.channels == 4


def test_defaults_from_a_file(checkpoint: Path) -> None:
    defaults = checkpoint / "generation_config.json"
    defaults.write_text('{"num_inference_steps": 20, "guidance_scale": 5}')
    found = read(checkpoint).defaults
    assert (found.num_inference_steps, found.guidance_scale) == (20, 5.0)
    for text in ('{"num_inference_steps": 0}', '{"num_inference_steps": "many"}', '{"guidance_scale": []}'):
        defaults.write_text(text)
        refuse(checkpoint, r"generation_config\.json\) are not usable")
    defaults.write_text("{")
    refuse(checkpoint, r"generation_config\.json' is not JSON")


def test_a_size_of_two_numbers(checkpoint: Path) -> None:
    edit(checkpoint / "unet" / "config.json", sample_size=[16, 24])
    found = read(checkpoint).defaults
    assert (found.height, found.width) == (128, 192)


@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_path(empty: str) -> None:
    refuse(empty, "checkpoint path is empty")


def test_missing_folder(tmp_path: Path, offline: list[dict[str, Any]]) -> None:
    for path in (tmp_path / "none", "./none", "../none", "none", "~/allaprima/none", "a/b/c"):
        refuse(path, "does not exist: name a diffusers folder or a hub id")
    assert offline == []


def test_a_hub_id_without_a_network(offline: list[dict[str, Any]]) -> None:
    refuse("owner/model-1.5", r"cannot be downloaded as a hub id \(ConnectionError\): check the spelling")
    (asked,) = offline
    assert asked["repo"] == "owner/model-1.5"


def test_what_is_downloaded(offline: list[dict[str, Any]]) -> None:
    """Not the gigabytes beside it: other precisions, single files, pickles."""
    with pytest.raises(ExportError):
        open_checkpoint("owner/model")
    (asked,) = offline
    wanted = [
        "model_index.json",
        "generation_config.json",
        "feature_extractor/preprocessor_config.json",
        "safety_checker/model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
    ]
    unwanted = [
        "v1-5-pruned-emaonly.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "README.md",
    ]
    found = huggingface_hub.utils.filter_repo_objects(
        [*wanted, *unwanted],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(found) == wanted


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match="cannot be read as safetensors"):
        export_checkpoint(str(tmp_path / "model.safetensors"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_index(tmp_path: Path) -> None:
    refuse(tmp_path, r"is not a diffusers checkpoint: it has no model_index\.json")


@pytest.mark.parametrize("text", ["", "{", "\udcff", "[1]", "{}", '{"_class_name": 3}'])
def test_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_bytes(text.encode(errors="surrogateescape"))
    refuse(tmp_path, r"model_index\.json' (is not JSON|is not a JSON object|names no pipeline class)")


@pytest.mark.parametrize("field", ["latents_mean", "latents_std", "shift_factor"])
def test_latents_that_are_more_than_scaled(checkpoint: Path, field: str) -> None:
    edit(checkpoint / "vae" / "config.json", **{field: [0.1] * 4})
    refuse(checkpoint, f"the autoencoder has {field}")


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionControlNetPipeline"])
def test_unknown_pipeline(checkpoint: Path, name: str) -> None:
    edit(checkpoint / "model_index.json", _class_name=name)
    refuse(checkpoint, f"is a {name}: this exporter knows StableDiffusionPipeline")


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae", "scheduler"])
@pytest.mark.parametrize("entry", [None, [None, None], ["diffusers"], "diffusers", [None, 3], {}])
def test_an_index_that_names_no_class(checkpoint: Path, part: str, entry: Any) -> None:
    edit(checkpoint / "model_index.json", **{part: entry})
    refuse(checkpoint, f"names no class for the {part}")


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_unknown_class(checkpoint: Path, part: str) -> None:
    edit(checkpoint / "model_index.json", **{part: ["diffusers", "Abacus"]})
    refuse(checkpoint, f"the checkpoint's {part} is of class Abacus: this exporter knows")


@pytest.mark.parametrize("name", ["AbacusScheduler", "__doc__", "StableDiffusionPipeline"])
def test_unknown_scheduler(checkpoint: Path, name: str) -> None:
    edit(checkpoint / "model_index.json", scheduler=["diffusers", name])
    refuse(checkpoint, f"the checkpoint's scheduler is of class {name}, which diffusers does not have")


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_missing_folder_of_a_part(checkpoint: Path, part: str) -> None:
    shutil.rmtree(checkpoint / part)
    refuse(checkpoint, f"has no folder '{part}': it is incomplete")


@pytest.mark.parametrize("part", ["scheduler", "tokenizer"])
def test_missing_folder_without_weights(checkpoint: Path, part: str) -> None:
    shutil.rmtree(checkpoint / part)
    refuse(checkpoint, part)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt"])
@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_pickled_weights(checkpoint: Path, part: str, suffix: str) -> None:
    (file,) = (checkpoint / part).glob("*.safetensors")
    file.rename(file.with_suffix(suffix))
    refuse(checkpoint, f"{part}' holds pickled weights, which can run code: convert them to safetensors")
    file.with_suffix(suffix).unlink()
    refuse(checkpoint, f"{part}' holds no safetensors weights: the checkpoint is incomplete")


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_broken_configuration(checkpoint: Path, part: str) -> None:
    (checkpoint / part / "config.json").write_text("{")
    refuse(checkpoint, f"{part}/config.json' is not JSON")
    (checkpoint / part / "config.json").unlink()
    refuse(checkpoint, f"{part}/config.json' cannot be read: No such file")


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ("text_encoder", "hidden_size"),
        ("text_encoder", "max_position_embeddings"),
        ("unet", "in_channels"),
        ("unet", "block_out_channels"),
        ("vae", "latent_channels"),
        ("vae", "block_out_channels"),
    ],
)
@pytest.mark.parametrize("value", [None, "many", 0, True, []])
def test_ill_typed_configuration(checkpoint: Path, part: str, field: str, value: Any) -> None:
    edit(checkpoint / part / "config.json", **{field: value})
    refuse(checkpoint, rf"{field} in the config\.json of {part} should be a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 8}, "takes 8 channels and the autoencoder makes 4: known are UNets of 4, and of 9"),
        ({"out_channels": 9}, "makes 9 channels of 4: it should make as many, or twice as many"),
        ({"cross_attention_dim": 768}, "width 768, the text encoder makes 32: they do not belong together"),
        ({"addition_embed_type": "text_time"}, "'text_time', and 0 text encoders a pooled vector"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep', a condition that Stable Diffusion"),
    ],
)
def test_unets_of_other_families(checkpoint: Path, change: dict[str, Any], message: str) -> None:
    edit(checkpoint / "unet" / "config.json", **change)
    refuse(checkpoint, message)


def test_broken_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer" / "tokenizer.json").write_text("{")
    refuse(checkpoint, "tokenizer")


@pytest.mark.parametrize("text", ["{", '{"beta_schedule": 3}', "[]"])
def test_broken_scheduler(checkpoint: Path, text: str) -> None:
    (checkpoint / "scheduler" / "scheduler_config.json").write_text(text)
    refuse(checkpoint, r"(scheduler_config\.json' is not|the scheduler's configuration is not usable)")


@pytest.mark.parametrize(
    ("part", "kind"),
    [("text_encoder", CLIPTextModel), ("unet", UNet2DConditionModel), ("vae", AutoencoderKL)],
)
def test_load(tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str], part: str, kind: type) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        module = open_checkpoint(str(tiny_checkpoint)).load(part, dtype)
        assert isinstance(module, kind)
        assert {weight.dtype for weight in module.parameters()} == {dtype}
        assert not module.training
        assert not any(weight.requires_grad for weight in module.parameters())
    assert capfd.readouterr() == ("", "")


Spoil = Callable[[Path], object]
SPOILS: dict[str, Spoil] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "not safetensors": lambda file: file.write_bytes(b"x" * 5000),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_broken_weights(checkpoint: Path, part: str, spoil: str) -> None:
    (file,) = (checkpoint / part).glob("*.safetensors")
    SPOILS[spoil](file)
    with pytest.raises(ExportError, match=f"{part} cannot be loaded as"):
        open_checkpoint(str(checkpoint)).load(part, torch.float32)
