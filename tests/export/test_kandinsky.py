"""Kandinsky 2.2: the same seed gives the embeddings and pictures of diffusers' pipelines."""

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

from allaprima.bundle import Bundle, BundleError, ExportError, RequestError
from allaprima.cli.main import main
from allaprima.export import export_checkpoint
from allaprima.export.kandinsky import read_family
from allaprima.export.source import open_checkpoint
from allaprima.runtime import Pipeline, Progress, Request, Settings, read_parameters
from allaprima.runtime.footprint import Footprint
from allaprima.runtime.kandinsky import Kandinsky
from allaprima.runtime.loop import run_out
from allaprima.runtime.noise import Noise
from allaprima.runtime.opener import Opener

from .conftest import Export, write_tiny_kandinsky, write_tiny_prior
from .test_parity import Pictures, picture, psnr

PROMPT = "a small red circle above a blue square on a white background"
NEGATIVE = "a green star"
SEED = 11
STEPS: dict[str, Any] = {"num_inference_steps": 5, "prior_num_inference_steps": 4}
Pair = tuple[dict[str, Any], Pipeline]


@pytest.fixture(scope="module")
def pair(kandinsky_checkpoint: Path, prior_checkpoint: Path, kandinsky_bundle: Bundle) -> Iterator[Pair]:
    """The parts of diffusers' pipelines, as the combined ones name them, and the runtime."""
    parts = parts_of(kandinsky_checkpoint, prior_checkpoint)
    with Pipeline.open(kandinsky_bundle.folder, backend="ort", threads=1) as pipeline:
        yield parts, pipeline


@pytest.fixture(scope="module")
def inpainting(
    prior_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, export: Export
) -> Iterator[Pair]:
    """A decoder that was trained to inpaint."""
    decoder = tmp_path_factory.mktemp("kandinsky")
    write_tiny_kandinsky(decoder, kind="KandinskyV22InpaintPipeline", in_channels=9)
    bundle = export(decoder, "kandinsky-inpainting", "fp32", prior=str(prior_checkpoint))
    with Pipeline.open(bundle.folder, backend="ort", threads=1) as pipeline:
        yield parts_of(decoder, prior_checkpoint), pipeline


def parts_of(decoder: Path, prior: Path) -> dict[str, Any]:
    load = diffusers.DiffusionPipeline.from_pretrained
    parts = load(prior, dtype=torch.float32).components
    return {
        **load(decoder, dtype=torch.float32).components,
        **{f"prior_{name}": part for name, part in parts.items()},
    }


def reference(parts: dict[str, Any], task: str = "", *, images: int = 1, **settings: Any) -> Pictures:
    """What diffusers paints of one seed after the other, each alone."""
    pipeline = getattr(diffusers, f"KandinskyV22{task}CombinedPipeline")(**parts)
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
    images = pipeline.generate(**{"prompt": PROMPT, "seed": SEED, **options}).images
    return np.stack([np.asarray(image) for image in images])


def worst(wanted: Pictures, got: Pictures) -> float:
    return min(psnr(want, each) for want, each in zip(wanted, got, strict=True))


@pytest.mark.parametrize("negative", [None, "", NEGATIVE])
@pytest.mark.parametrize("scale", [4.0, 1.0])
@pytest.mark.parametrize("steps", [2, 25])
def test_embeddings(pair: Pair, negative: str | None, scale: float, steps: int) -> None:
    parts, pipeline = pair
    prior = diffusers.KandinskyV22PriorPipeline(
        **{name.removeprefix("prior_"): part for name, part in parts.items() if name.startswith("prior_")}
    )
    prior.set_progress_bar_config(disable=True)
    family = family_of(pipeline)
    settings = family.settle(
        settings_of(
            pipeline, negative_prompt=negative, prior_guidance_scale=scale, prior_num_inference_steps=steps
        )
    )
    told = family.plan(settings)
    assert told.warnings == ()
    run_out(told.draw([Noise(SEED), Noise(SEED + 1)]))
    for index in range(2):
        made = prior(
            PROMPT,
            negative_prompt=negative,
            guidance_scale=scale,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(SEED + index),
        )
        wanted = np.stack([made.negative_image_embeds.numpy()[0], made.image_embeds.numpy()[0]])
        assert np.abs(told.embeds[:, index] - wanted).max() <= 1e-4 * np.abs(wanted).max()


def family_of(pipeline: Pipeline) -> Kandinsky:
    family = pipeline._family
    assert isinstance(family, Kandinsky)
    return family


def settings_of(pipeline: Pipeline, **options: Any) -> Settings:
    return Request(PROMPT, **options).check(pipeline.bundle.manifest)


@pytest.mark.parametrize("negative", [None, "", NEGATIVE])
@pytest.mark.parametrize(
    "settings",
    [
        {"height": 64, "width": 64},
        {"height": 48, "width": 96},
        {"height": 48, "width": 32, "guidance_scale": 1.0},
        {"height": 32, "width": 64, "prior_guidance_scale": 1.0},
        {"height": 32, "width": 32, "guidance_scale": 9.5, "prior_guidance_scale": 2.0},
    ],
)
def test_text_to_image(pair: Pair, settings: dict[str, Any], negative: str | None) -> None:
    settings = {**STEPS, "negative_prompt": negative, **settings}
    wanted = reference(pair[0], images=2, **settings)
    assert wanted.std() > 5
    assert psnr(wanted[0], wanted[1]) < 40, "seeds should matter"
    assert worst(wanted, pixels(pair[1], num_images=2, **settings)) >= 45


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("size", [(64, 64), (70, 50), (33, 96)])
@pytest.mark.parametrize("strength", [None, 0.7, 1.0])
def test_image_to_image(
    pair: Pair, size: tuple[int, int], strength: float | None, negative: str | None
) -> None:
    """diffusers hands width and height to its resizing in the wrong order, so here it has them swapped."""
    given = {} if strength is None else {"strength": strength}
    settings = {**STEPS, "negative_prompt": negative, "image": picture(*size), **given}
    wanted = reference(pair[0], "Img2Img", images=2, **settings, height=64, width=48)
    assert wanted.shape == (2, 48, 64, 3)
    got = pixels(pair[1], num_images=2, **settings, height=48, width=64)
    assert worst(wanted, got) >= 45


@pytest.mark.parametrize(("negative", "scale"), [(None, 4.0), (NEGATIVE, 4.0), (None, 1.0)])
@pytest.mark.parametrize("size", [(64, 48), (97, 61)])
def test_inpainting(inpainting: Pair, size: tuple[int, int], scale: float, negative: str | None) -> None:
    settings = {**STEPS, "negative_prompt": negative, "guidance_scale": scale, "image": picture(*size)}
    settings |= {"height": 48, "width": 64}
    mask = Image.fromarray((np.indices(size[::-1]).sum(0) % 40 < 17).astype(np.uint8) * 255)
    wanted = reference(inpainting[0], "Inpaint", images=2, mask_image=mask, **settings)
    assert worst(wanted, pixels(inpainting[1], num_images=2, mask=mask, **settings)) >= 45


def test_a_decoder_of_pictures_keeps_what_a_mask_keeps(pair: Pair) -> None:
    """One that was not trained to inpaint has the rest put back after every step."""
    image, mask = picture(64, 64), np.zeros((64, 64, 3), np.uint8)
    mask[:, :32] = 255
    whole = pixels(pair[1], image=image, strength=0.3, **STEPS)
    found = pixels(pair[1], image=image, mask=mask, **STEPS)
    kept = pixels(pair[1], image=image, mask=np.zeros_like(mask), **STEPS)
    assert psnr(found[:, :, 52:], kept[:, :, 52:]) > psnr(found[:, :, :16], kept[:, :, :16]) + 3
    assert psnr(whole, kept) < 45


def test_other_samplers_and_batches(pair: Pair) -> None:
    """Any sampler may paint, and a picture is the same alone and among others."""
    settings = {**STEPS, "sampler": "dpmpp_2m", "negative_prompt": NEGATIVE, "height": 32, "width": 48}
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
    settings = {**STEPS, "height": 48, "width": 32, "num_images": 2, "negative_prompt": NEGATIVE}
    with Pipeline.open(pair[1].bundle.folder, backend="openvino", precision="fp32") as other:
        assert worst(pixels(pair[1], **settings), pixels(other, **settings)) >= 45


def test_others_take_steps_between_those_of_a_prior(pair: Pair) -> None:
    """Both pictures are to the bit what each is alone."""
    _, pipeline = pair
    requests = [
        Request(PROMPT, seed=seed, num_inference_steps=9, prior_num_inference_steps=4) for seed in (1, 2)
    ]
    first, second = (pipeline.settle(request)[0] for request in requests)
    painted = pipeline.prepare(first)
    lanes = pipeline.lanes(painted.shape, 2)
    lanes.admit(painted)
    steps: list[int] = []

    def take_a_step(_: None) -> None:
        lanes.step()
        steps.append(painted.row)

    joined = run_out(pipeline.prepare_in_parts(second), take_a_step)
    assert steps == [1, 2, 3, 4]
    assert joined.encoding > 0
    lanes.admit(joined)
    made = []
    for painting in (painted, joined):
        while not painting.done:
            lanes.step()
        lanes.release(painting)
        made.append(np.stack([np.asarray(image) for image in pipeline.finish(painting).images]))
    for request, together in zip(requests, made, strict=True):
        alone = pipeline.paint(request)
        assert np.array_equal(np.stack([np.asarray(image) for image in alone.images]), together)


def test_half_is_close_to_full(pair: Pair, kandinsky_bundle: Bundle) -> None:
    """Random weights make pictures of full contrast, in which guidance multiplies what 16 bits round."""
    with Pipeline.open(kandinsky_bundle.folder, backend="ort", precision="fp16", threads=1) as half:
        embeds = []
        for pipeline in (pair[1], half):
            told = family_of(pipeline).plan(family_of(pipeline).settle(settings_of(pipeline)))
            run_out(told.draw([Noise(SEED)]))
            embeds.append(told.embeds)
        assert np.abs(embeds[0] - embeds[1]).max() <= 0.01 * np.abs(embeds[0]).max()
        settings = {**STEPS, "guidance_scale": 1.0}
        assert worst(pixels(pair[1], **settings), pixels(half, **settings)) >= 30


def test_what_a_bundle_holds(kandinsky_bundle: Bundle) -> None:
    manifest = kandinsky_bundle.manifest
    assert manifest.family == "kandinsky-2.2"
    parts = ["text_encoder", "prior", "image_encoder", "denoiser", "vae_decoder", "vae_encoder"]
    assert list(manifest.components) == parts
    assert (manifest.latent.downscale, manifest.latent.multiple) == (4, 16)
    assert (manifest.defaults.num_inference_steps, manifest.defaults.guidance_scale) == (100, 4.0)
    settings = json.loads(kandinsky_bundle.path("prior/settings.json").read_text())
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (25, 4.0)
    assert {len(settings[name]) for name in ("mean", "std", "zero")} == {32}
    graph = onnx.load(kandinsky_bundle.path("denoiser/model.onnx"), load_external_data=False).graph
    assert [each for each in graph.input if each.name == "learned_variance"] == []


def test_parameters_say_what_the_prior_did(pair: Pair, tmp_path: Path) -> None:
    (told,) = pair[1].generate(PROMPT, seed=1, num_inference_steps=2).parameters
    assert (told.prior_num_inference_steps, told.prior_guidance_scale) == (25, 4.0)
    output = tmp_path / "picture.png"
    words = [str(pair[1].bundle.folder), PROMPT, "--steps", "2", "--seed", "4", "--prior-steps", "3"]
    words += ["--prior-guidance", "2.5", "--backend", "ort", "--quiet", "-o", str(output)]
    assert main(["generate", *words]) == 0
    wanted = pixels(
        pair[1], num_inference_steps=2, seed=4, prior_num_inference_steps=3, prior_guidance_scale=2.5
    )
    assert psnr(wanted[0], np.asarray(Image.open(output))) > 60
    assert read_parameters(output)["prior_num_inference_steps"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 50}, "height 50 is not a multiple of 16: the nearest valid sizes are 48 and 64"),
        ({"prior_num_inference_steps": 1}, "prior_num_inference_steps is 1: it should be at least 2"),
        ({"prior_num_inference_steps": 2.5}, "should be a whole number"),
        ({"prior_num_inference_steps": 1001}, "this model takes 1 to 1000"),
        ({"prior_guidance_scale": float("nan")}, "prior_guidance_scale is nan"),
        ({"clip_skip": 1}, "clip_skip is 1, but this model's prior cannot take it"),
        ({"long_prompts": True}, "long_prompts is True, but this model's prior cannot take it"),
        ({"prompt_weights": True}, "prompt_weights is True, but this model's prior cannot take it"),
        ({"prompt_2": "x"}, "one text encoder"),
        ({"prompt": "\udc80"}, "not valid Unicode"),
    ],
)
def test_requests_that_are_refused(pair: Pair, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pair[1].generate(**{"prompt": PROMPT, **STEPS, **options})


def test_others_have_no_prior(tiny_bundle: Bundle) -> None:
    with Pipeline.open(tiny_bundle.folder, backend="ort") as pipeline:
        for name in ("prior_num_inference_steps", "prior_guidance_scale"):
            with pytest.raises(RequestError, match=rf"{name} is 4(\.0)?, but this model has no prior"):
                pipeline.generate(PROMPT, **{name: 4})  # type: ignore[arg-type]


def test_warnings(pair: Pair) -> None:
    settings = {"num_inference_steps": 1, "prior_num_inference_steps": 2}
    result = pair[1].generate("red " * 200, negative_prompt="green", guidance_scale=1.0, **settings)
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith("the prompt is too long, this was left out")
    result = pair[1].generate(
        PROMPT, negative_prompt="green", guidance_scale=1.0, prior_guidance_scale=1.0, **settings
    )
    assert result.warnings == (
        "the negative prompt has no effect with guidance_scale 1.0 and prior_guidance_scale 1.0: one of them "
        "should be above 1",
    )


def test_the_prior_tells_and_can_be_stopped(pair: Pair) -> None:
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if (progress.stage, progress.step) == ("prior", 3):
            raise KeyboardInterrupt

    wanted = pixels(pair[1], **STEPS)
    with pytest.raises(KeyboardInterrupt):
        pair[1].generate("another", num_images=2, callback=stop, **STEPS)
    told = [(progress.stage, progress.step, progress.total) for progress in seen]
    assert told == [("prior", step, 4) for step in (1, 2, 3)]
    assert seen[0].sample.shape[0] == 2
    assert not seen[0].sample.flags.writeable
    assert np.array_equal(pixels(pair[1], **STEPS), wanted)


def test_within_a_memory_limit(pair: Pair) -> None:
    """One component after the other, and for a prompt that was encoded before without the text encoder."""
    bundle, image, limit = pair[1].bundle, picture(64, 64), 1_900_000_000
    opener = Opener(bundle, "ort", threads=1, memory_limit=limit)
    sessions = {role: opener.open(role) for role in ("text_encoder", "prior", "denoiser", "vae_decoder")}
    with Pipeline(
        bundle,
        sessions,
        backend="ort",
        opens=opener.open,
        memory_limit=limit,
        weigh=lambda _: Footprint(10**9, 10**9),  # so that there is no room for two
    ) as limited:
        for settings in ({}, {"image": image}, {"negative_prompt": NEGATIVE, "num_images": 2}):
            assert np.array_equal(pixels(limited, **settings, **STEPS), pixels(pair[1], **settings, **STEPS))
        memory = limited.generate("a cat", seed=1, **STEPS).memory
        assert memory is not None
        assert memory.loaded == ("text_encoder", "prior", "denoiser", "vae_decoder")
        assert memory.peak <= limit
        memory = limited.generate("a cat", seed=2, **STEPS).memory
        assert memory is not None
        assert "text_encoder" not in memory.loaded


def test_a_prior_without_settings(kandinsky_bundle: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(kandinsky_bundle.folder, tmp_path / "copy")
    for broken in ("", '{"scheduler": {}}'):
        file = copy / "prior" / "settings.json"
        file.write_text(
            broken + " " * (kandinsky_bundle.path("prior/settings.json").stat().st_size - len(broken))
        )
        with pytest.raises(BundleError, match=r"settings of the prior cannot be read|missing field"):
            Pipeline.open(copy, backend="ort")


def refuse(decoder: Path, prior: Path | None, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_checkpoint(str(decoder), decoder.parent / "never", prior=None if prior is None else str(prior))
    assert not (decoder.parent / "never").exists()


def test_pairs_that_are_refused(
    kandinsky_checkpoint: Path, prior_checkpoint: Path, tiny_checkpoint: Path
) -> None:
    refuse(kandinsky_checkpoint, None, "which needs a prior: name its folder, or hub id, as --prior")
    refuse(prior_checkpoint, None, "the prior of Kandinsky: name the decoder's folder first")
    refuse(kandinsky_checkpoint, kandinsky_checkpoint, "the prior is a KandinskyV22Pipeline: it should be")
    refuse(kandinsky_checkpoint, tiny_checkpoint, "the prior is a StableDiffusionPipeline")
    refuse(tiny_checkpoint, prior_checkpoint, "a StableDiffusionPipeline, which takes no prior")
    refuse(kandinsky_checkpoint, prior_checkpoint.parent / "nowhere", "does not exist")


def test_a_prior_of_another_width(kandinsky_checkpoint: Path, tmp_path: Path) -> None:
    prior = write_tiny_prior(tmp_path / "prior", embedding=64)
    refuse(kandinsky_checkpoint, prior, r"embeddings of width 64 .* the UNet takes \(encoder_hid_dim\) is 32")


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("unet", {"in_channels": 8}, "takes 8 channels and the autoencoder makes 4"),
        ("unet", {"out_channels": 4}, "makes 4 channels: it should make 8"),
        ("unet", {"addition_embed_type": "text"}, "addition_embed_type 'text': known are"),
        ("unet", {"addition_embed_type": "image_hint"}, "takes 4 channels: with a hint it should take 8"),
        ("movq", {"latent_channels": None}, "latent_channels in the config.json of movq"),
    ],
)
def test_decoders_that_are_refused(
    kandinsky_checkpoint: Path,
    prior_checkpoint: Path,
    tmp_path: Path,
    part: str,
    fields: dict[str, Any],
    message: str,
) -> None:
    copy = shutil.copytree(kandinsky_checkpoint, tmp_path / "copy")
    path = copy / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    refuse(copy, prior_checkpoint, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_embeddings": 64}, "reads 64 states of text, the text encoder makes 77"),
        ({"clip_embed_dim": 64}, r"the prior makes \(clip_embed_dim\) is 64"),
        ({"added_emb_type": None}, "added_emb_type 'prd'"),
    ],
)
def test_priors_that_are_refused(
    kandinsky_checkpoint: Path, prior_checkpoint: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    copy = shutil.copytree(prior_checkpoint, tmp_path / "copy")
    path = copy / "prior" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    refuse(kandinsky_checkpoint, copy, message)


def test_a_folder_with_both(kandinsky_checkpoint: Path, prior_checkpoint: Path, tmp_path: Path) -> None:
    """As the combined pipelines save themselves."""
    folder = tmp_path / "both"
    diffusers.KandinskyV22CombinedPipeline(
        **parts_of(kandinsky_checkpoint, prior_checkpoint)
    ).save_pretrained(folder)
    apart = read_family(
        open_checkpoint(str(kandinsky_checkpoint)),
        open_checkpoint(str(prior_checkpoint)),
        image_encoder=True,
    )
    both = read_family(open_checkpoint(str(folder)), None, image_encoder=True)
    assert both.tokenizers == apart.tokenizers
    assert both.conditions == apart.conditions
    assert [both.write_files(tmp_path / "a"), apart.write_files(tmp_path / "b")] == [None, None]
    for name in ("prior/settings.json", "image_encoder/settings.json", "tokenizer/tokenizer.json"):
        found, wanted = (json.loads((tmp_path / each / name).read_text()) for each in "ab")
        for each in (found, wanted):
            if "scheduler" in each:
                each["scheduler"] = {k: v for k, v in each["scheduler"].items() if k[0] != "_"}
        assert found == wanted
    for part in ("prior", "text_encoder"):
        assert both.prior is not None
        assert both.prior.load(part, torch.float32).state_dict().keys()
