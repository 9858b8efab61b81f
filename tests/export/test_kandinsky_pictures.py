"""What Kandinsky 2.2 makes of pictures: mixes, a picture that the prior begins with, and depth maps."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from allaprima.bundle import Bundle, BundleError, ExportError, RequestError
from allaprima.cli.main import main
from allaprima.export import export_checkpoint
from allaprima.runtime import Pipeline, Request, read_parameters
from allaprima.runtime.kandinsky import Kandinsky
from allaprima.runtime.loop import run_out
from allaprima.runtime.noise import Noise

from .test_kandinsky import NEGATIVE, PROMPT, SEED, STEPS, Pair, parts_of, pixels, worst
from .test_parity import Pictures, picture, psnr

PICTURE = picture(70, 50)
ITEMS: list[tuple[Any, float]] = [(PROMPT, 0.3), (PICTURE, 0.6), ("a star", -0.2)]
FEW = {name: value for name, value in STEPS.items() if not name.startswith("prior")}


@pytest.fixture(scope="module")
def pair(kandinsky_checkpoint: Path, prior_checkpoint: Path, kandinsky_bundle: Bundle) -> Iterator[Pair]:
    """The parts of diffusers' pipelines, as the combined ones name them, and the runtime."""
    with Pipeline.open(kandinsky_bundle.folder, backend="ort", threads=1) as pipeline:
        yield parts_of(kandinsky_checkpoint, prior_checkpoint), pipeline


@pytest.fixture(scope="module")
def depth(depth_checkpoint: Path, prior_checkpoint: Path, depth_bundle: Bundle) -> Iterator[Pair]:
    """Likewise, of a decoder that follows a depth map."""
    with Pipeline.open(depth_bundle.folder, backend="ort", threads=1) as pipeline:
        yield parts_of(depth_checkpoint, prior_checkpoint), pipeline


def quiet(kind: str, parts: dict[str, Any], prefix: str = "") -> Any:
    """A pipeline of diffusers, of the parts with this prefix, or of the decoder's."""
    named = {
        name.removeprefix(prefix): part
        for name, part in parts.items()
        if name.startswith(prefix or "prior_") == bool(prefix)
    }
    pipeline = getattr(diffusers, f"KandinskyV22{kind}Pipeline")(**named)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Pipeline, prompt: str, streams: list[Noise], **options: Any) -> NDArray[np.float32]:
    """The runtime's embeddings, negative and positive [2,N,D]."""
    family = pipeline._family
    assert isinstance(family, Kandinsky)
    told = family.plan(family.settle(Request(prompt, **options).check(pipeline.bundle.manifest)))
    assert told.warnings == ()
    run_out(told.draw(streams))
    return told.embeds


def agree(got: NDArray[np.float32], wanted: torch.Tensor) -> None:
    expected = wanted.numpy()[0]
    assert np.abs(expected).max() > 0.1
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def generators() -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(SEED + index) for index in range(2)]


def at_one_place(stream: Noise, generator: torch.Generator) -> None:
    """As many numbers were drawn of both, so what is drawn later agrees."""
    wanted = torch.randn((4, 8), generator=generator).numpy()
    assert np.abs(stream.normal((4, 8)) - wanted).max() < 1e-5


@pytest.mark.parametrize("size", [(70, 50), (33, 96), (28, 28), (300, 20), (7, 9)])
def test_embeddings_of_pictures(pair: Pair, size: tuple[int, int]) -> None:
    parts, pipeline = pair
    image = picture(*size)
    with torch.no_grad():
        pixel_values = parts["prior_image_processor"](image, return_tensors="pt").pixel_values
        wanted = parts["prior_image_encoder"](pixel_values).image_embeds
    agree(draw(pipeline, "", [Noise(0)], mix=[(image, 1)])[1, 0], wanted)


@pytest.mark.parametrize("negative", [None, "", NEGATIVE])
@pytest.mark.parametrize("prior_negative", [None, "", "blur"])
@pytest.mark.parametrize(
    ("items", "scale"), [(ITEMS, 4.0), (ITEMS[:1], 1.0), (ITEMS[1:2], 4.0), (ITEMS[::-1], 2.0)]
)
def test_mixes(
    pair: Pair,
    items: list[tuple[Any, float]],
    scale: float,
    negative: str | None,
    prior_negative: str | None,
) -> None:
    parts, pipeline = pair
    prior = quiet("Prior", parts, "prior_")
    streams = [Noise(SEED), Noise(SEED + 1)]
    asked = {"mix": items, "negative_prompt": negative, "prior_negative_prompt": prior_negative}
    asked |= {"prior_num_inference_steps": 3, "prior_guidance_scale": scale}
    found = draw(pipeline, "", streams, **asked)
    for index, generator in enumerate(generators()):
        made = prior.interpolate(
            *([item[part] for item in items] for part in (0, 1)),
            num_inference_steps=3,
            generator=generator,
            negative_prior_prompt=prior_negative,
            negative_prompt=negative or "",
            guidance_scale=scale,
        )
        agree(found[1, index], made.image_embeds)
        agree(found[0, index], made.negative_image_embeds)
        at_one_place(streams[index], generator)


def test_what_counts_for_nothing_is_drawn_all_the_same(pair: Pair) -> None:
    """Without guidance of the denoiser nothing is made of a mix's negative, but its noise."""
    for negative in (None, "blur"):
        asked = {"mix": ITEMS, "prior_negative_prompt": negative, "prior_num_inference_steps": 3}
        streams = [Noise(SEED)], [Noise(SEED)]
        guided = draw(pair[1], "", streams[0], **asked)
        alone = draw(pair[1], "", streams[1], **asked, guidance_scale=1.0)
        assert np.array_equal(guided[1], alone[1])
        assert np.array_equal(streams[0][0].normal((20,)), streams[1][0].normal((20,)))


@pytest.mark.parametrize("negative", [None, "", NEGATIVE])
@pytest.mark.parametrize("strength", [None, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_a_prior_that_begins_with_a_picture(
    pair: Pair, strength: float | None, negative: str | None, scale: float
) -> None:
    parts, pipeline = pair
    prior = quiet("PriorEmb2Emb", parts, "prior_")
    streams = [Noise(SEED), Noise(SEED + 1)]
    given = {} if strength is None else {"strength": strength}
    found = draw(
        pipeline,
        PROMPT,
        streams,
        prior_image=PICTURE,
        prior_num_inference_steps=5,
        prior_guidance_scale=scale,
        negative_prompt=negative,
        **{f"prior_{name}": value for name, value in given.items()},
    )
    for index, generator in enumerate(generators()):
        made = prior(
            PROMPT,
            PICTURE,
            negative_prompt=negative,
            num_inference_steps=5,
            generator=generator,
            guidance_scale=scale,
            **given,
        )
        agree(found[1, index], made.image_embeds)
        agree(found[0, index], made.negative_image_embeds)
        at_one_place(streams[index], generator)


def paint(kind: str, parts: dict[str, Any], embed: Any, **settings: Any) -> Pictures:
    """What diffusers paints of two seeds, each alone, after a prior with the same generator."""
    pipeline = quiet(kind, parts)
    made = [
        pipeline(**embed(generator), generator=generator, output_type="np", **FEW, **settings).images
        for generator in generators()
    ]
    assert worst(made[0] * 255, made[1] * 255) < 40, "seeds should matter"
    return (np.concatenate(made) * 255).round().astype(np.uint8)


@pytest.mark.parametrize(("negative", "scale"), [(None, 4.0), (NEGATIVE, 4.0), (None, 1.0)])
def test_pictures_of_mixes(pair: Pair, negative: str | None, scale: float) -> None:
    parts, pipeline = pair
    prior = quiet("Prior", parts, "prior_")
    settings: dict[str, Any] = {"guidance_scale": scale}

    def embed(generator: torch.Generator) -> Any:
        items, weights = zip(*ITEMS, strict=True)
        return prior.interpolate(
            items, weights, num_inference_steps=4, generator=generator, negative_prompt=negative or ""
        )

    asked = {**STEPS, **settings, "num_images": 2, "prompt": "", "mix": ITEMS, "negative_prompt": negative}
    wanted = paint("", parts, embed, **settings, height=48, width=96)
    assert worst(wanted, pixels(pipeline, **asked, height=48, width=96)) >= 45
    # diffusers hands width and height to its resizing in the wrong order.
    wanted = paint("Img2Img", parts, embed, **settings, image=PICTURE, height=64, width=48)
    assert worst(wanted, pixels(pipeline, **asked, image=PICTURE, height=48, width=64)) >= 45


def embedder(parts: dict[str, Any], negative: str | None) -> Any:
    prior = quiet("Prior", parts, "prior_")
    return lambda generator: prior(
        PROMPT, negative_prompt=negative, num_inference_steps=4, generator=generator
    )


def hint_of(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """As the tests' decoder takes it: eight pixels a latent, of which its pictures have four."""
    resized = image.resize((2 * width, 2 * height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(resized, np.float32) / 255).permute(2, 0, 1)[None]


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize(("height", "width", "scale"), [(64, 64, 4.0), (48, 96, 4.0), (48, 32, 1.0)])
def test_depth(depth: Pair, height: int, width: int, scale: float, negative: str | None) -> None:
    parts, pipeline = depth
    settings: dict[str, Any] = {"height": height, "width": width, "guidance_scale": scale}
    asked = {**STEPS, **settings, "negative_prompt": negative, "num_images": 2}
    made = []
    for hint in (PICTURE, picture(20, 90)):
        told = hint_of(hint, height, width)
        wanted = paint("Controlnet", parts, embedder(parts, negative), hint=told, **settings)
        made.append(pixels(pipeline, hint=hint, **asked))
        assert worst(wanted, made[-1]) >= 45
    assert worst(*made) < 40, "hints should matter"


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("strength", [None, 0.7])
def test_depth_over_a_picture(depth: Pair, strength: float | None, negative: str | None) -> None:
    parts, pipeline = depth
    given = {} if strength is None else {"strength": strength}
    given |= {"image": picture(33, 96)}
    # diffusers hands width and height to its resizing in the wrong order, so the hint lies with the latents.
    wanted = paint(
        "ControlnetImg2Img",
        parts,
        embedder(parts, negative),
        hint=hint_of(PICTURE, 48, 64),
        height=64,
        width=48,
        **given,
    )
    asked = {**STEPS, **given, "negative_prompt": negative, "num_images": 2, "hint": PICTURE}
    assert worst(wanted, pixels(pipeline, **asked, height=48, width=64)) >= 45


def test_other_backends_paint_the_same(pair: Pair, depth: Pair) -> None:
    pytest.importorskip("openvino")
    settings = {**STEPS, "height": 48, "width": 32}
    for pipeline, asked in ((pair[1], {"prompt": "", "mix": ITEMS}), (depth[1], {"hint": PICTURE})):
        with Pipeline.open(pipeline.bundle.folder, backend="openvino", precision="fp32") as other:
            assert worst(pixels(pipeline, **settings, **asked), pixels(other, **settings, **asked)) >= 45


def test_half_is_close_to_full(pair: Pair, kandinsky_bundle: Bundle) -> None:
    with Pipeline.open(kandinsky_bundle.folder, backend="ort", precision="fp16", threads=1) as half:
        full, rounded = (draw(each, "", [Noise(0)], mix=ITEMS[1:2])[1] for each in (pair[1], half))
    assert np.abs(full - rounded).max() <= 0.01 * np.abs(full).max()


def test_the_image_encoder_is_loaded_when_it_is_needed(kandinsky_bundle: Bundle) -> None:
    with Pipeline.open(kandinsky_bundle.folder, backend="ort", threads=1) as pipeline:
        asked: dict[str, Any] = {"num_inference_steps": 1, "prior_num_inference_steps": 2, "height": 16}
        pipeline.generate("", mix=[("text", 1)], **asked)
        assert "image_encoder" not in vars(pipeline)["_components"].sessions
        first = pixels(pipeline, prompt="", mix=ITEMS, **asked)
        pipeline.unload()
        assert np.array_equal(first, pixels(pipeline, prompt="", mix=ITEMS, **asked))


def test_parameters_and_command_line(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    PICTURE.save("photo.png")
    words = [str(pair[1].bundle.folder), "--steps", "2", "--seed", "4", "--prior-steps", "3"]
    words += ["--backend", "ort", "--quiet", "--size", "64x48"]
    settings: dict[str, Any] = {"num_inference_steps": 2, "seed": 4, "prior_num_inference_steps": 3}
    settings |= {"width": 64, "height": 48}
    mixed = ["--mix", "a = b=0.3", "--mix", "photo.png=.7", "--prior-negative-prompt", "blur"]
    assert main(["generate", *words, *mixed, "-o", "mixed.png"]) == 0
    asked = {"prompt": "", "mix": [("a = b", 0.3), (PICTURE, 0.7)], "prior_negative_prompt": "blur"}
    assert psnr(pixels(pair[1], **settings, **asked)[0], np.asarray(Image.open("mixed.png"))) > 60
    told = read_parameters("mixed.png")
    assert (told["mix"], told["prior_negative_prompt"]) == ([["a = b", 0.3], [None, 0.7]], "blur")
    begun = ["a cat", "--prior-image", "photo.png", "--prior-strength", "0.5"]
    assert main(["generate", *words, *begun, "-o", "begun.png"]) == 0
    asked = {"prompt": "a cat", "prior_image": PICTURE, "prior_strength": 0.5}
    assert psnr(pixels(pair[1], **settings, **asked)[0], np.asarray(Image.open("begun.png"))) > 60
    assert (read_parameters("begun.png")["prior_strength"], read_parameters("begun.png")["mix"]) == (
        0.5,
        None,
    )
    assert main(["generate", *words, "a cat", "--hint", "photo.png", "-o", "no.png"]) == 2
    assert "there is a hint, but this model takes none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": []}, r"mix is \[\]: it should be a list of one or more pairs"),
        ({"mix": "a cat"}, "mix is 'a cat': it should be a list"),
        ({"mix": ["a cat"]}, "item 1 of the mix is 'a cat': it should be a pair"),
        ({"mix": [("a", 1), ("b", float("nan"))]}, "the weight of item 2 of the mix is nan"),
        ({"mix": [("a", "1")]}, "the weight of item 1 of the mix is '1': it should be a finite number"),
        ({"mix": [(7, 1.0)]}, "item 1 of the mix is a int"),
        ({"mix": [(b"no picture", 1.0)]}, "item 1 of the mix cannot be read: not a picture"),
        ({"mix": [(Path("none.png"), 1.0)]}, "item 1 of the mix none.png cannot be read: No such file"),
        ({"mix": [("a", 1)], "prompt": "b"}, "there is a mix, and a prompt 'b' beside it"),
        ({"mix": [("a", 1)], "prior_image": PICTURE}, "a mix and a prior_image: hand in one of them"),
        ({"mix": [("\udc80", 1)]}, "not valid Unicode"),
        ({"prior_negative_prompt": "a"}, "prior_negative_prompt is 'a', but it is for a mix"),
        ({"mix": [("a", 1)], "prior_negative_prompt": 1}, "prior_negative_prompt is 1: it should be a text"),
        ({"prior_strength": 0.5}, "prior_strength is 0.5, but there is no prior_image"),
        ({"prior_image": PICTURE, "prior_strength": 1.1}, "prior_strength is 1.1: it should lie between"),
        (
            {"prior_image": PICTURE, "prior_strength": 0.2, "prior_num_inference_steps": 4},
            "prior_strength 0.2 of 4 steps is no step at all: raise it to 0.25",
        ),
        ({"prior_image": b"no picture"}, "prior_image cannot be read"),
        ({"hint": PICTURE}, "there is a hint, but this model takes none: leave it out"),
    ],
)
def test_requests_that_are_refused(pair: Pair, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pair[1].generate(**{"prompt": "", **FEW, **options})


def test_bundles_without(depth: Pair, tiny_bundle: Bundle) -> None:
    """An image encoder, a prior, or a hint where one is needed."""
    for asked in ({"mix": ITEMS}, {"prior_image": PICTURE}):
        with pytest.raises(RequestError, match=r"no image encoder, which .* again with --image-encoder"):
            depth[1].generate("", hint=PICTURE, **asked)  # type: ignore[arg-type]
    pixels(depth[1], **STEPS, prompt="", hint=PICTURE, mix=[("a cat", 1.0)])  # needs none
    with pytest.raises(RequestError, match="paints after a depth map: hand one in as `hint`"):
        depth[1].generate(PROMPT)
    with pytest.raises(RequestError, match="hint cannot be read"):
        depth[1].generate(PROMPT, hint=b"no picture")
    with Pipeline.open(tiny_bundle.folder, backend="ort") as pipeline:
        for asked in ({"mix": ITEMS}, {"prior_image": PICTURE}):
            with pytest.raises(
                RequestError, match=f"there is a {next(iter(asked))}, but this model has no prior"
            ):
                pipeline.generate("", **asked)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="there is a hint, but this model takes none"):
            pipeline.generate(PROMPT, hint=PICTURE)


def test_warnings(pair: Pair) -> None:
    asked: dict[str, Any] = {"num_inference_steps": 1, "prior_num_inference_steps": 2, "height": 16}
    asked |= {"guidance_scale": 1.0, "prior_guidance_scale": 1.0, "prior_negative_prompt": "blur"}
    mix = [(PICTURE, 1.0), ("red " * 200, 1.0)]
    result = pair[1].generate("", mix=mix, negative_prompt=NEGATIVE, guidance_rescale=0.5, **asked)
    long, *others = result.warnings
    assert long.startswith("the text 2 of the mix is too long")
    assert others == [
        "the negative prompt has no effect with guidance_scale 1.0: it needs above 1",
        "prior_negative_prompt has no effect with prior_guidance_scale 1.0: it needs above 1",
        "guidance_rescale has no effect with guidance_scale 1.0: it needs above 1",
    ]


def test_an_image_encoder_without_settings(kandinsky_bundle: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(kandinsky_bundle.folder, tmp_path / "copy")
    file = copy / "image_encoder" / "settings.json"
    file.write_text(" " * file.stat().st_size)
    with (
        Pipeline.open(copy, backend="ort") as pipeline,
        pytest.raises(BundleError, match="settings of the image encoder cannot be read"),
    ):
        pipeline.generate("", mix=ITEMS)


def test_others_have_no_image_encoder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="a StableDiffusionPipeline, which takes no image encoder"):
        export_checkpoint(str(tiny_checkpoint), tmp_path / "never", image_encoder=True)
    assert not (tmp_path / "never").exists()


def test_what_bundles_hold(kandinsky_bundle: Bundle, depth_bundle: Bundle) -> None:
    assert "hint_encoder" not in kandinsky_bundle.manifest.components
    encoder, hints = kandinsky_bundle.component("image_encoder"), depth_bundle.component("hint_encoder")
    assert [(spec.name, spec.shape) for spec in (*encoder.inputs, *encoder.outputs)] == [
        ("pixel_values", ("B", 3, 28, 28)),
        ("image_embeds", ("B", 32)),
    ]
    assert [(spec.name, spec.shape) for spec in (*hints.inputs, *hints.outputs)] == [
        ("hint", ("B", 3, "8*H", "8*W")),
        ("hint_embeds", ("B", 4, "H", "W")),
    ]
    assert "image_encoder" not in depth_bundle.manifest.components
