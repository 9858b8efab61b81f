"""Kandinsky 3: the same seed gives the pictures of diffusers' pipelines."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from transformers import T5Tokenizer

from allaprima.bundle import Bundle, BundleError, ExportError, RequestError
from allaprima.cli.main import main
from allaprima.export import Usage, export_checkpoint
from allaprima.export.kandinsky3 import read_family
from allaprima.export.masked import MaskedDenoiser
from allaprima.export.source import open_checkpoint
from allaprima.runtime import Pipeline, Request, Result, read_parameters
from allaprima.runtime.kandinsky3 import MASK, POOLING, STATES
from allaprima.runtime.tokenizer import Tokenizer

from .test_parity import Pictures, picture, psnr

PROMPT = "a small red circle above a blue square on a white background"
NEGATIVE = "a green star"
LONG = "two purple dots under a thin line, " * 12
"""More than 128 tokens."""
SEED = 11
STEPS: dict[str, Any] = {"num_inference_steps": 5}
Pair = tuple[dict[str, Any], Pipeline]


@pytest.fixture(scope="module")
def pair(kandinsky3_checkpoint: Path, kandinsky3_bundle: Bundle) -> Iterator[Pair]:
    """The parts of diffusers' pipelines, and the runtime."""
    load = diffusers.DiffusionPipeline.from_pretrained
    parts = load(kandinsky3_checkpoint, dtype=torch.float32).components
    with Pipeline.open(kandinsky3_bundle.folder, backend="ort", threads=1) as pipeline:
        yield parts, pipeline


def reference(parts: dict[str, Any], task: str = "", *, images: int = 1, **settings: Any) -> Pictures:
    """What diffusers paints of one seed after the other, each alone."""
    pipeline = getattr(diffusers, f"Kandinsky3{task}Pipeline")(**parts)
    pipeline.set_progress_bar_config(disable=True)
    made = [
        pipeline(
            **{"prompt": PROMPT, **settings},
            generator=torch.Generator("cpu").manual_seed(SEED + index),
            output_type="np",
        ).images
        for index in range(images)
    ]
    return (np.concatenate(made) * 255).round().astype(np.uint8)


def pixels(pipeline: Pipeline, **options: Any) -> Pictures:
    return shown(pipeline.generate(**{"prompt": PROMPT, "seed": SEED, **options}))


def shown(result: Result) -> Pictures:
    return np.stack([np.asarray(image) for image in result.images])


def worst(wanted: Pictures, got: Pictures) -> float:
    return min(psnr(want, each) for want, each in zip(wanted, got, strict=True))


@pytest.mark.parametrize("negative", [None, "", NEGATIVE, LONG])
@pytest.mark.parametrize(
    "settings",
    [
        {"height": 64, "width": 64},
        {"height": 64, "width": 128, "prompt": "red"},
        {"height": 128, "width": 64, "prompt": LONG},
        {"height": 64, "width": 64, "prompt": ""},
        {"height": 64, "width": 64, "guidance_scale": 1.0},
        {"height": 64, "width": 64, "guidance_scale": 7.5, "num_inference_steps": 25},
    ],
    ids=["square", "wide", "long", "empty", "unguided", "guided"],
)
def test_text_to_image(pair: Pair, settings: dict[str, Any], negative: str | None) -> None:
    """Prompts of any length, each longer or shorter than the negative one."""
    settings = {**STEPS, "negative_prompt": negative, **settings}
    wanted = reference(pair[0], images=2, **settings)
    assert wanted.std() > 5
    assert psnr(wanted[0], wanted[1]) < 40, "seeds should matter"
    assert worst(wanted, pixels(pair[1], num_images=2, **settings)) >= 45


@pytest.mark.parametrize("negative", [None, "", NEGATIVE, LONG])
@pytest.mark.parametrize("prompt", [PROMPT, "", "red", LONG])
def test_what_the_denoiser_is_told(pair: Pair, prompt: str, negative: str | None) -> None:
    """What diffusers tells it in L rows, and 128 - L further ones that count nothing."""
    told = diffusers.Kandinsky3Pipeline(**pair[0]).encode_prompt(
        prompt, negative_prompt=negative, _cut_context=True, device="cpu"
    )
    text, other, mask, other_mask = (each.numpy()[0] for each in told)
    rows = len(text)
    settings = Request(prompt, negative_prompt=negative, num_images=2, height=64, width=64).check(
        pair[1].bundle.manifest
    )
    plan = pair[1]._family.plan(settings)
    denoiser = vars(pair[1])["_stages"].denoiser(settings, plan.length)
    plan.write(denoiser)
    denoiser.pull_conditions()
    states, masks, pooling = (denoiser.conditions[name].array for name in (STATES, MASK, POOLING))
    assert states.shape == (2, 2, 128, 32)
    np.testing.assert_allclose(pooling[..., :rows], 1 / rows, rtol=1e-6)
    assert not pooling[..., rows:].any()
    assert not masks[..., rows:].any()
    for branch, (wanted, seen) in enumerate([(other, other_mask), (text, mask)]):
        for lane in range(2):
            assert masks[branch, lane, :rows].tolist() == seen.tolist()
            np.testing.assert_allclose(states[branch, lane, :rows], wanted, atol=1e-5)


def test_what_a_prompt_says_matters(pair: Pair) -> None:
    """Or the comparison above would show little."""
    settings = {**STEPS, "height": 64, "width": 64}
    found = [
        pixels(pair[1], **settings),
        pixels(pair[1], **settings, prompt="red"),
        pixels(pair[1], **settings, negative_prompt=NEGATIVE),
        pixels(pair[1], **settings, negative_prompt=""),
        pixels(pair[1], **settings, guidance_scale=4.0),
    ]
    for index, one in enumerate(found):
        assert all(worst(one, other) < 42 for other in found[index + 1 :])


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("size", [(64, 64), (135, 71), (64, 128)])
@pytest.mark.parametrize("strength", [None, 0.7, 1.0])
def test_image_to_image(
    pair: Pair, size: tuple[int, int], strength: float | None, negative: str | None
) -> None:
    given = {} if strength is None else {"strength": strength}
    settings = {**STEPS, "negative_prompt": negative, "image": picture(*size), **given}
    wanted = reference(pair[0], "Img2Img", images=2, **settings)
    assert worst(wanted, pixels(pair[1], num_images=2, **settings)) >= 45


def test_what_a_mask_keeps_stays(pair: Pair) -> None:
    image, mask = picture(64, 64), np.zeros((64, 64, 3), np.uint8)
    mask[:, :32] = 255
    whole = pixels(pair[1], image=image, strength=1.0, **STEPS)
    found = pixels(pair[1], image=image, mask=mask, **STEPS)
    kept = pixels(pair[1], image=image, mask=np.zeros_like(mask), **STEPS)
    assert psnr(found[:, :, 52:], kept[:, :, 52:]) > psnr(found[:, :, :16], kept[:, :, :16]) + 3
    assert psnr(whole, kept) < 45


def test_other_samplers_and_batches(pair: Pair) -> None:
    """Any sampler may paint, and a picture is the same alone and among others."""
    settings = {**STEPS, "sampler": "dpmpp_2m", "negative_prompt": NEGATIVE, "height": 64, "width": 128}
    parts = {**pair[0]}
    parts["scheduler"] = diffusers.DPMSolverMultistepScheduler.from_config(
        parts["scheduler"].config, variance_type=None
    )
    wanted = reference(parts, images=3, **{k: v for k, v in settings.items() if k != "sampler"})
    together = pixels(pair[1], num_images=3, **settings)
    assert worst(wanted, together) >= 45
    assert psnr(together[2], pixels(pair[1], **{**settings, "seed": SEED + 2})[0]) >= 60


def test_other_backends_paint_the_same(pair: Pair) -> None:
    pytest.importorskip("openvino")
    settings = {**STEPS, "height": 64, "width": 128, "num_images": 2, "negative_prompt": NEGATIVE}
    with Pipeline.open(pair[1].bundle.folder, backend="openvino", precision="fp32") as other:
        assert worst(pixels(pair[1], **settings), pixels(other, **settings)) >= 45


@pytest.mark.parametrize(("backend", "precision"), [("ort", "fp16"), ("openvino", None)])
def test_half_is_close_to_full(
    pair: Pair, kandinsky3_bundle: Bundle, backend: str, precision: str | None
) -> None:
    """Random weights make pictures of full contrast, in which guidance multiplies what 16 bits round."""
    if backend == "openvino":
        pytest.importorskip("openvino")
    settings = {**STEPS, "guidance_scale": 1.0, "height": 64, "width": 64}
    with Pipeline.open(kandinsky3_bundle.folder, backend=backend, precision=precision, threads=1) as half:
        assert worst(pixels(pair[1], **settings), pixels(half, **settings)) >= 30


Arrays = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def denoiser(pair: Pair) -> MaskedDenoiser:
    return MaskedDenoiser(pair[0]["unet"], (MASK, POOLING))


def step_of(lengths: tuple[int, ...], rows: int) -> Arrays:
    """Inputs of a step on samples whose texts have so many tokens, in so many rows; sample i is always it."""
    random, lanes = [torch.Generator().manual_seed(index) for index in range(len(lengths))], len(lengths)
    sample = torch.stack([torch.randn(4, 8, 8, generator=each) for each in random])
    states, mask, pooling = (
        torch.zeros(2, lanes, rows, 32),
        torch.zeros(2, lanes, rows),
        torch.zeros(2, lanes, rows),
    )
    for lane, length in enumerate(lengths):
        states[1, lane, :length] = torch.randn(length, 32, generator=random[lane])
        mask[1, lane, :length] = 1
        pooling[:, lane, : length + 1] = 1 / (length + 1)
    return {
        "sample": sample,
        "history": torch.zeros(4, lanes, 4, 8, 8),
        "noise": torch.zeros(lanes, 4, 8, 8),
        "timestep": torch.full((lanes,), 501.0),
        "input_scale": torch.ones(lanes),
        "guidance": torch.tensor([[-3.0], [4.0]]).expand(2, lanes).contiguous(),
        "to_prediction": torch.tensor([[0.0, 1.0]]).repeat(lanes, 1),
        "bounds": torch.full((lanes,), 3e38),
        "update": torch.tensor([[0.0, 1.0, *[0.0] * 6]]).repeat(lanes, 1),
        STATES: states.flatten(0, 1),
        "guidance_rescale": torch.zeros(lanes),
        MASK: mask.flatten(0, 1),
        POOLING: pooling.flatten(0, 1),
    }


def lane_of(step: Arrays, lane: int) -> Arrays:
    """The inputs of one sample alone."""
    lanes = len(step["sample"])
    axes = {"history": 1, "guidance": 1}
    return {
        name: value.unflatten(0, (2, lanes))[:, lane].contiguous()
        if name in (STATES, MASK, POOLING)
        else value.narrow(axes.get(name, 0), lane, 1).contiguous()
        for name, value in step.items()
    }


def test_a_sample_does_not_see_its_neighbours_text(pair: Pair, kandinsky3_bundle: Bundle) -> None:
    """Texts of 3, 9 and 20 tokens in one batch, and each alone in the rows that it needs by itself."""
    onnxruntime = pytest.importorskip("onnxruntime")
    graph = onnxruntime.InferenceSession(kandinsky3_bundle.path("denoiser/float32.onnx"))
    lengths = (3, 9, 20)
    together = step_of(lengths, 128)
    (made, _) = graph.run(None, {name: value.numpy() for name, value in together.items()})
    for lane, length in enumerate(lengths):
        alone = lane_of(together, lane)
        alone |= {name: alone[name][:, : length + 1].contiguous() for name in (STATES, MASK, POOLING)}
        (single, _) = graph.run(None, {name: value.numpy() for name, value in alone.items()})
        with torch.no_grad():
            uncond, text = pair[0]["unet"](
                alone["sample"].repeat(2, 1, 1, 1),
                501,
                encoder_hidden_states=alone[STATES],
                encoder_attention_mask=alone[MASK].bool(),
                return_dict=False,
            )[0]
        wanted = 4 * text - 3 * uncond
        assert np.abs(single[0] - wanted.numpy()).max() <= 1e-4 * wanted.abs().max()
        assert np.abs(made[lane] - single[0]).max() <= 1e-4 * wanted.abs().max()


def test_what_a_bundle_holds(kandinsky3_bundle: Bundle) -> None:
    manifest = kandinsky3_bundle.manifest
    assert manifest.family == "kandinsky-3"
    assert list(manifest.components) == ["text_encoder", "denoiser", "vae_decoder", "vae_encoder"]
    assert manifest.latent.downscale == 8
    defaults = manifest.defaults
    assert (defaults.height, defaults.width) == (1024, 1024)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (25, 3.0)
    spec = manifest.tokenizers["text_encoder"]
    assert (spec.length, spec.bos, spec.eos, spec.pad, spec.room) == (128, None, 1, 0, 127)
    assert manifest.zero_negative
    assert manifest.preview is not None
    graph = onnx.load(kandinsky3_bundle.path("denoiser/model.onnx"), load_external_data=False).graph
    assert not [node for node in graph.node if node.op_type in ("If", "Loop")]


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " ",
        PROMPT,
        "A  Red\n\tcircle ",
        "red </s> circle <pad> <extra_id_1> <unk>",
        "12 stripes; it's déjà vu, naïve — 東京 🎨",
        LONG,
        "x" * 200,
    ],
)
def test_ids_are_those_of_transformers(
    kandinsky3_checkpoint: Path, kandinsky3_bundle: Bundle, prompt: str
) -> None:
    tokenizer = T5Tokenizer.from_pretrained(kandinsky3_checkpoint / "tokenizer")
    made = tokenizer(prompt, padding="max_length", truncation=True, max_length=128)
    found = Tokenizer(kandinsky3_bundle).encode(prompt)
    assert found.ids.tolist() == made.input_ids
    assert found.count == sum(made.attention_mask)


def test_what_was_cut(pair: Pair) -> None:
    settings = {"num_inference_steps": 1, "height": 64, "width": 64}
    (warning,) = pair[1].generate(LONG, **settings).warnings
    told = 'the prompt is too long, this was left out: "'
    assert warning.startswith(told)
    assert LONG.endswith(warning.removeprefix(told).removesuffix('"'))
    warnings = pair[1].generate(PROMPT, negative_prompt=NEGATIVE, guidance_scale=1.0, **settings).warnings
    assert warnings == ("the negative prompt has no effect with guidance_scale 1.0: it needs above 1",)


def test_previews(pair: Pair) -> None:
    seen: list[Image.Image] = []
    settings = {**STEPS, "height": 64, "width": 128}
    pair[1].generate(PROMPT, preview_every=2, callback=lambda told: seen.extend(told.previews), **settings)
    assert [image.size for image in seen] == [(16, 8)] * len(seen)
    assert len(seen) >= 2


def test_the_command_paints(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = str(pair[1].bundle.folder), tmp_path / "picture.png"
    words = [folder, PROMPT, "--steps", "2", "--seed", "4", "--size", "128x64", "--backend", "ort", "--quiet"]
    assert main(["generate", *words, "-o", str(output)]) == 0
    wanted = pixels(pair[1], num_inference_steps=2, seed=4, height=64, width=128)
    assert psnr(wanted[0], np.asarray(Image.open(output))) > 60
    assert read_parameters(output)["guidance_scale"] == 3.0
    assert main(["inspect", folder]) == 0
    told = capsys.readouterr().out
    assert "kandinsky-3" in told
    assert "up to 127 tokens" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 100}, "height 100 is not a multiple of 16: the nearest valid sizes are 96 and 112"),
        ({"clip_skip": 1}, "clip_skip is 1, but this model's text encoder cannot take it"),
        ({"long_prompts": True}, "long_prompts is True, but this model's text encoder cannot take it"),
        ({"prompt_weights": True}, "prompt_weights is True, but this model's text encoder cannot take it"),
        ({"prompt_2": "x"}, "one text encoder"),
        ({"prior_guidance_scale": 4.0}, "prior_guidance_scale is 4.0, but this model has no prior"),
        ({"prompt": "\udc80"}, "not valid Unicode"),
        ({"negative_prompt": "\udc80"}, "not valid Unicode"),
    ],
)
def test_requests_that_are_refused(pair: Pair, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pair[1].generate(**{"prompt": PROMPT, "height": 64, "width": 64, **STEPS, **options})


def changed(checkpoint: Path, target: Path, part: str, file: str, **fields: Any) -> Path:
    copy = shutil.copytree(checkpoint, target / "copy")
    path = copy / part / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return copy


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("unet", {"in_channels": 9}, "takes 9 channels, as one for inpainting does"),
        ("unet", {"in_channels": 8}, "takes 8 channels and the autoencoder makes 4"),
        ("unet", {"encoder_hid_dim": 64}, r"width 64 \(encoder_hid_dim\), the text encoder makes 32"),
        ("text_encoder", {"d_model": None}, "d_model in the config.json of text_encoder"),
        ("movq", {"latent_channels": None}, "latent_channels in the config.json of movq"),
        ("unet", {"block_out_channels": []}, "block_out_channels in the config.json of unet"),
    ],
)
def test_checkpoints_that_are_refused(
    kandinsky3_checkpoint: Path, tmp_path: Path, part: str, fields: dict[str, Any], message: str
) -> None:
    copy = changed(kandinsky3_checkpoint, tmp_path, part, "config.json", **fields)
    with pytest.raises(ExportError, match=message):
        export_checkpoint(str(copy), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_it_takes_no_prior(kandinsky3_checkpoint: Path, prior_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="a Kandinsky3Pipeline, which takes no prior"):
        export_checkpoint(str(kandinsky3_checkpoint), tmp_path / "never", prior=str(prior_checkpoint))


def test_another_tokenizer_is_refused(kandinsky3_checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(kandinsky3_checkpoint, tmp_path / "copy")
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ExportError, match=r"tokenizer in .* cannot be loaded"):
        read_family(open_checkpoint(str(copy)))


def test_a_sentencepiece_model_needs_its_library(
    kandinsky3_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(kandinsky3_checkpoint, tmp_path / "copy")
    (copy / "tokenizer" / "tokenizer.json").rename(copy / "tokenizer" / "spiece.model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"spiece\.model.* pip install sentencepiece"):
        read_family(open_checkpoint(str(copy)))


def test_the_published_sizes(kandinsky3_checkpoint: Path, tmp_path: Path) -> None:
    """Image to image is the same model, and a UNet of four levels paints multiples of 64 pixels."""
    channels = {"block_out_channels": [384, 768, 1536, 3072]}
    copy = changed(kandinsky3_checkpoint, tmp_path, "unet", "config.json", **channels)
    index = copy / "model_index.json"
    index.write_text(index.read_text().replace("Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline"))
    assert read_family(open_checkpoint(str(copy))).latent.multiple == 64


def test_flash_is_a_preset(kandinsky3_checkpoint: Path) -> None:
    family = Usage("flash").apply(read_family(open_checkpoint(str(kandinsky3_checkpoint))))
    assert (family.defaults.num_inference_steps, family.defaults.guidance_scale) == (4, 1.0)
    assert family.scheduler["_class_name"] == "FlashScheduler"
    assert family.scheduler["beta_schedule"] == "squaredcos_cap_v2"


def test_a_bundle_without_its_tokenizer(kandinsky3_bundle: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(kandinsky3_bundle.folder, tmp_path / "copy")
    file = copy / kandinsky3_bundle.manifest.tokenizers["text_encoder"].file
    file.write_text(" " * file.stat().st_size)
    with pytest.raises(BundleError, match="is not a tokenizer"):
        Pipeline.open(copy, backend="ort")
