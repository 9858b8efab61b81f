"""Single files in the original layout: unpacked, they are the folder that they were made of."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from allaprima.bundle import BundleError, ExportError
from allaprima.export import checkpoint, export_checkpoint
from allaprima.export.single_file import SingleFile, unpack
from allaprima.export.source import open_checkpoint
from allaprima.export.stable_diffusion import read_family

from . import original

Weights = dict[str, torch.Tensor]
TOKENIZER = Path(__file__).parents[2] / "models" / "shapes" / "checkpoint" / "tokenizer"
CHANNELS, LAYERS = (32, 64, 64), 2
TEXT = {
    "vocab_size": 767,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "bos_token_id": 765,
    "eos_token_id": 766,
    "pad_token_id": 766,
}


@pytest.fixture(scope="module")
def parts() -> Mapping[str, Weights]:
    """The weights of three small networks of the first family."""
    torch.manual_seed(3)
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
    models = {"text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)), "unet": unet, "vae": vae}
    return {name: dict(model.state_dict()) for name, model in models.items()}


def as_one(parts: Mapping[str, Weights]) -> Weights:
    """All in one, under the original names."""
    text = original.clip(parts["text_encoder"], "cond_stage_model.")
    return original.separate({**original.unet(parts["unet"]), **original.vae(parts["vae"]), **text})


@pytest.fixture
def file(parts: Mapping[str, Weights], tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(as_one(parts), path)
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


@pytest.mark.parametrize("layers", [24, 23])
def test_the_second_family(parts: Mapping[str, Weights], layers: int, tmp_path: Path) -> None:
    """It uses 23 of the layers of its text encoder; the last of 24 is in some files."""
    text = CLIPTextModel(CLIPTextConfig(**{**TEXT, "num_hidden_layers": layers})).state_dict()
    weights = {name: value for name, value in as_one(parts).items() if "cond_stage_model" not in name}
    second = original.separate(original.open_clip(text, "cond_stage_model."))
    second["cond_stage_model.model.text_projection"] = torch.zeros(64, 64)
    save_file({**weights, **second}, tmp_path / "model.safetensors")
    unpack(tmp_path / "model.safetensors", tmp_path / "folder", ABOUT)
    checkpoint = open_checkpoint(str(tmp_path / "folder"))
    got = checkpoint.load("text_encoder", torch.float32).state_dict()
    assert got.keys() == {name for name in text if ".23." not in name}
    assert all(torch.equal(got[name], text[name]) for name in got)
    assert checkpoint.config("text_encoder")["num_hidden_layers"] == 23
    assert checkpoint.config("text_encoder")["hidden_act"] == "gelu"
    assert checkpoint.config("unet")["attention_head_dim"] == [1, 1, 1]
    assert checkpoint.config("scheduler", "scheduler_config.json")["prediction_type"] == "v_prediction"


def test_averaged_weights_are_preferred(parts: Mapping[str, Weights], tmp_path: Path) -> None:
    weights = as_one(parts)
    averaged = original.averaged(weights)
    save_file({**weights, **averaged}, tmp_path / "model.safetensors")
    unpack(tmp_path / "model.safetensors", tmp_path / "folder", ABOUT)
    got = read(tmp_path / "folder", "unet")
    assert all(torch.equal(got[name], value + 1) for name, value in parts["unet"].items())
    averaged.popitem()
    save_file({**weights, **averaged}, tmp_path / "part.safetensors")
    with pytest.raises(ExportError, match=r"has averaged weights, but lacks model_ema\.diffusion_model"):
        unpack(tmp_path / "part.safetensors", tmp_path / "part", ABOUT)


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
        (lambda w: w.update({"edm_mean": torch.zeros(4)}), "of the EDM kind .*edm_mean"),
        (
            lambda w: [w.pop(name) for name in list(w) if name.startswith("cond_stage_model.")],
            r"has no text encoder that is known here \(conditioner",
        ),
        (
            lambda w: w.update({"model.diffusion_model.label_emb.0.0.weight": torch.zeros(4, 4)}),
            r"the unet has too many: model\.diffusion_model\.label_emb\.0\.0\.weight",
        ),
        (
            lambda w: w.update({"first_stage_model.more": torch.zeros(1)}),
            r"the vae has too many: first_stage_model\.more",
        ),
        (
            lambda w: w.update({"cond_stage_model.more": torch.zeros(1)}),
            r"the text_encoder has too many: cond_stage_model\.more",
        ),
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


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_folder_goes_in_every_case(file: Path, tmp_path: Path, error: type[BaseException] | None) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with nullcontext() if error is None else pytest.raises(error):  # noqa: SIM117
        with checkpoint.opened(str(file), ABOUT, place) as opened:
            assert opened.folder.parent == place
            assert (opened.folder / "unet" / "config.json").is_file()
            if error is not None:
                raise error
    assert not any(place.iterdir())


def test_it_is_unpacked_beside_the_bundle(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error leaves nothing there, not even folders that were made on the way."""
    seen: list[Path] = []

    def unpack(file: Path, folder: Path, about: SingleFile) -> None:
        (folder / "unet").mkdir()
        seen.append(folder.parent)
        raise ExportError("damaged")

    monkeypatch.setattr(checkpoint, "unpack", unpack)
    with pytest.raises(ExportError, match="damaged"):
        export_checkpoint(str(file), tmp_path / "new" / "bundle")
    assert seen == [tmp_path / "new"]
    assert not (tmp_path / "new").exists()


def test_a_target_that_exists_is_told_before_unpacking(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "unpack", lambda *_: pytest.fail("unpacked"))
    (tmp_path / "target").write_text("mine")
    with pytest.raises(BundleError, match="is a file: name a folder"):
        export_checkpoint(str(file), tmp_path / "target")
