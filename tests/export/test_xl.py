"""SDXL: the same seed gives the picture of diffusers' pipelines, and the traps on the way there."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPTokenizer

from allaprima.benchmarks.lineup import Asked, line_up
from allaprima.bundle import Bundle, RequestError
from allaprima.cli.main import main
from allaprima.runtime import Pipeline, read_parameters
from allaprima.runtime.backends import engine_precision
from allaprima.runtime.samplers import find
from allaprima.runtime.tokenizer import Tokenizer

from .test_parity import Pictures, picture, psnr

PROMPT = "a small red circle! above a blue square!!! on a white background"
SAMPLERS = ("euler", "euler_a", "dpmpp_2m", "heun", "ddim", "unipc")
GUIDANCE = 5.0
References = Callable[..., Any]


def references_of(folder: Path) -> References:
    """diffusers' pipelines of a checkpoint, by task and sampler."""
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    parts, flags = loaded.components, {}
    if loaded.config.get("requires_aesthetics_score"):
        flags["requires_aesthetics_score"] = True
    own = {**loaded.scheduler.config, "clip_sample": False}

    def paint(task: str, sampler: str, *, images: int = 1, output_type: str = "np", **settings: Any) -> Any:
        info = find(sampler)
        scheduler = getattr(diffusers, info.scheduler).from_config(own, **info.overrides)
        given = {**parts, "scheduler": scheduler}
        zeros = {"force_zeros_for_empty_prompt": loaded.config["force_zeros_for_empty_prompt"]}
        pipeline = getattr(diffusers, f"StableDiffusionXL{task}Pipeline")(**given, **flags, **zeros)
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator("cpu").manual_seed(11 + k) for k in range(images)]
        made = pipeline(
            **{"prompt": PROMPT, "guidance_scale": GUIDANCE, **settings},
            num_images_per_prompt=images,
            generator=generators,
            output_type=output_type,
        ).images
        return made if output_type == "latent" else (made * 255).round().astype(np.uint8)

    return paint


@pytest.fixture(scope="module")
def base(xl_checkpoint: Path, xl_bundle: Bundle) -> Iterator[tuple[References, Pipeline]]:
    with Pipeline.open(xl_bundle.folder, backend="ort", threads=1) as pipeline:
        yield references_of(xl_checkpoint), pipeline


@pytest.fixture(scope="module")
def refiner(refiner_checkpoint: Path, refiner_bundle: Bundle) -> Iterator[tuple[References, Pipeline]]:
    with Pipeline.open(refiner_bundle.folder, backend="ort", threads=1) as pipeline:
        yield references_of(refiner_checkpoint), pipeline


def pixels(pipeline: Pipeline, sampler: str, **options: Any) -> Pictures:
    options = {"guidance_scale": GUIDANCE, **options}
    return np.stack(
        [np.asarray(image) for image in pipeline.generate(PROMPT, sampler=sampler, seed=11, **options).images]
    )


def worst(wanted: Pictures, got: Pictures) -> float:
    return min(psnr(want, each) for want, each in zip(wanted, got, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"negative_prompt": ""},
        {"negative_prompt": "a blue star!!"},
        {"guidance_scale": 1.0},
        {"clip_skip": 1},
        {"prompt_2": "a green cross", "negative_prompt": "dull", "negative_prompt_2": "bright"},
        {
            "original_size": (64, 3000),
            "crops_coords_top_left": (10, 20),
            "target_size": (256, 128),
        },
        {
            "negative_original_size": (32, 64),
            "negative_crops_coords_top_left": (1, 2),
            "negative_target_size": (99, 98),
        },
    ],
)
def test_text_to_image(base: tuple[References, Pipeline], settings: dict[str, Any]) -> None:
    # With several images diffusers hands the negative sizes to every other of them, whatever its branch.
    images = 1 if "negative_target_size" in settings else 2
    settings = {"num_inference_steps": 5, "height": 64, "width": 96, **settings}
    wanted = base[0]("", "euler", images=images, **settings)
    assert worst(wanted, pixels(base[1], "euler", num_images=images, **settings)) >= 50


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(base: tuple[References, Pipeline], sampler: str) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 8, "height": 64, "width": 64}
    assert worst(base[0]("", sampler, **settings), pixels(base[1], sampler, **settings)) >= 50


def test_a_negative_prompt_of_nothing_is_not_none(base: tuple[References, Pipeline]) -> None:
    """Zeros for none, the encoded text for an empty one: two pictures."""
    none, empty = (
        pixels(base[1], "euler", num_inference_steps=4, negative_prompt=prompt) for prompt in (None, "")
    )
    assert psnr(none, empty) < 40


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_to_begin_with(base: tuple[References, Pipeline], sampler: str) -> None:
    image, mask = picture(96, 64), Image.new("L", (96, 64))
    mask.paste(255, (30, 10, 75, 50))
    settings: dict[str, Any] = {"image": image, "strength": 0.6, "num_inference_steps": 8}
    wanted = base[0]("Img2Img", sampler, **settings)
    assert worst(wanted, pixels(base[1], sampler, **settings)) >= 50
    wanted = base[0]("Inpaint", sampler, mask_image=mask, height=64, width=96, **settings)
    assert worst(wanted, pixels(base[1], sampler, mask=mask, **settings)) >= 50


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ddim", "unipc"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_base_and_refiner(
    base: tuple[References, Pipeline], refiner: tuple[References, Pipeline], sampler: str, share: float
) -> None:
    """The base stops in the middle, the refiner goes on with its latents."""
    settings: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": GUIDANCE}
    latents = base[0]("", sampler, images=2, denoising_end=share, output_type="latent", **settings)
    found = base[1].generate(
        PROMPT,
        sampler=sampler,
        seed=11,
        num_images=2,
        denoising_end=share,
        output_type="latent",
        **settings,
    )
    assert found.images == ()
    assert found.latents is not None
    assert np.abs(found.latents - latents.numpy()).max() < 1e-3
    wanted = refiner[0]("Img2Img", sampler, images=2, image=latents, denoising_start=share, **settings)
    refined = pixels(
        refiner[1], sampler, num_images=2, image=found.latents, denoising_start=share, **settings
    )
    assert worst(wanted, refined) >= 50


@pytest.mark.parametrize(
    "scores", [{}, {"aesthetic_score": 9.0}, {"aesthetic_score": 1.5, "negative_aesthetic_score": 8.0}]
)
def test_scores_of_the_refiner(refiner: tuple[References, Pipeline], scores: dict[str, Any]) -> None:
    settings = {"image": picture(64, 64), "strength": 0.7, "num_inference_steps": 6, **scores}
    wanted = refiner[0]("Img2Img", "euler", **settings)
    assert worst(wanted, pixels(refiner[1], "euler", **settings)) >= 50


def test_latents_are_painted_over(base: tuple[References, Pipeline]) -> None:
    """Latents stand for the picture that they decode to."""
    whole = base[1].generate(PROMPT, seed=5, num_inference_steps=3, output_type="latent")
    assert whole.latents is not None
    settings: dict[str, Any] = {"strength": 0.5, "num_inference_steps": 6}
    wanted = base[0]("Img2Img", "euler", image=torch.from_numpy(whole.latents), **settings)
    assert worst(wanted, pixels(base[1], "euler", image=whole.latents, **settings)) >= 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aesthetic_score": 6.0}, r"aesthetic_score is 6.0, but this model does not take it"),
        ({"original_size": (64,)}, r"original_size is \(64,\): it should be two whole numbers"),
        ({"target_size": (0, 64)}, "target_size is 0: it should be at least 1"),
        ({"denoising_end": 0.001}, "denoising_end 0.001 leaves no step"),
        ({"denoising_end": 1.0}, "denoising_end is 1.0: it should lie between 0 and 1"),
        ({"denoising_start": 0.5}, "there are no latents to go on from"),
        ({"denoising_start": 0.9999, "image": np.zeros((4, 8, 8))}, "leaves none of 4 steps"),
        ({"denoising_start": 0.5, "image": np.zeros((4, 8, 8)), "strength": 0.4}, "denoising_start says it"),
        ({"denoising_start": 0.5, "denoising_end": 0.5, "image": np.zeros((4, 8, 8))}, "is not before"),
        ({"image": np.zeros((3, 8, 8))}, r"float64 \[3, 8, 8\]: it should be uint8 .* or latents"),
        ({"image": np.zeros((4, 9, 8))}, "multiples of 2"),
        ({"image": np.full((4, 8, 8), np.nan)}, "not finite"),
        ({"image": np.zeros((2, 4, 8, 8)), "num_images": 3}, "num_images is 3, but there are latents of 2"),
        ({"image": np.zeros((4, 8, 8)), "height": 128}, "those of 64 x 64 pixels: leave both out"),
        ({"output_type": "numpy"}, "output_type is 'numpy': it should be 'pil' or 'latent'"),
    ],
)
def test_requests_that_are_refused(
    base: tuple[References, Pipeline], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        base[1].generate(PROMPT, **{"num_inference_steps": 4, "height": 64, "width": 64, **options})


def test_what_a_model_is_not_told(refiner: tuple[References, Pipeline], tiny_bundle: Bundle) -> None:
    with pytest.raises(RequestError, match=r"target_size is \(64, 64\), but this model does not take it"):
        refiner[1].generate(PROMPT, target_size=(64, 64))
    with pytest.raises(RequestError, match="prompt_2 is 'x', but this model has one text encoder"):
        refiner[1].generate(PROMPT, prompt_2="x")
    with Pipeline.open(tiny_bundle.folder, backend="ort") as plain:
        for field in ("original_size", "negative_crops_coords_top_left"):
            with pytest.raises(RequestError, match=rf"{field} is \(1, 2\), but this model does not take it"):
                plain.generate(PROMPT, **{field: (1, 2)})  # type: ignore[arg-type]


def test_parameters_make_the_picture_again(base: tuple[References, Pipeline]) -> None:
    result = base[1].generate(PROMPT, seed=3, num_inference_steps=2, prompt_2="b", original_size=(9, 8))
    (told,) = result.parameters
    assert (told.prompt_2, told.negative_prompt) == ("b", None)
    assert told.micro_conditioning is not None
    assert told.micro_conditioning.original_size == (9, 8)


def test_the_second_tokenizer_pads_with_an_exclamation_mark(xl_bundle: Bundle, xl_checkpoint: Path) -> None:
    """And so reads one as padding wherever it stands, which the first does not."""
    first, second = (Tokenizer(xl_bundle, role) for role in ("text_encoder", "text_encoder_2"))
    for tokenizer, part in ((first, "tokenizer"), (second, "tokenizer_2")):
        reference = CLIPTokenizer.from_pretrained(xl_checkpoint / part)
        wanted = reference(PROMPT, padding="max_length", max_length=77, truncation=True).input_ids
        assert tokenizer.encode(PROMPT).ids.tolist() == wanted
    assert first.encode(PROMPT).ids.tolist() != second.encode(PROMPT).ids.tolist()


def test_the_autoencoder_stays_out_of_half_precision(xl_bundle: Bundle) -> None:
    components = xl_bundle.manifest.components
    assert {name: part.precision for name, part in components.items()} == {
        **dict.fromkeys(("text_encoder", "text_encoder_2", "denoiser"), "fp16"),
        **dict.fromkeys(("vae_decoder", "vae_encoder"), "fp32"),
    }
    assert [name for name, part in components.items() if part.overflows_fp16] == [
        "vae_decoder",
        "vae_encoder",
    ]
    for backend in ("ort", "openvino"):
        assert engine_precision(components["vae_decoder"], backend, "fp16") == "fp32"
        assert engine_precision(components["denoiser"], backend, "fp16") == "fp16"
    with Pipeline.open(xl_bundle.folder, backend="ort", precision="fp16") as pipeline:
        half = np.asarray(pipeline.generate(PROMPT, seed=11, num_inference_steps=4).images[0])
    assert half.std() > 5


def test_half_is_close_to_full(base: tuple[References, Pipeline], xl_bundle: Bundle) -> None:
    assert base[1].precision == "fp32"
    with Pipeline.open(xl_bundle.folder, backend="ort", precision="fp16", threads=1) as pipeline:
        full, half = (pixels(each, "euler", num_inference_steps=5) for each in (base[1], pipeline))
    assert 35 <= psnr(full, half) < 100, "not the same arithmetic"


def test_no_operator_mixes_types(xl_bundle: Bundle) -> None:
    """The sinusoids of the sizes are float32, the text beside them must be too."""
    path = xl_bundle.path(xl_bundle.component("denoiser").graph)
    graph = onnx.shape_inference.infer_shapes(
        onnx.load(path, load_external_data=False), strict_mode=True
    ).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    joined = [node for node in graph.node if node.op_type == "Concat"]
    assert joined
    for node in joined:
        assert len({kinds[name] for name in node.input if name in kinds}) == 1, node.name


def test_the_last_layer_of_the_first_encoder_is_not_there(xl_bundle: Bundle) -> None:
    """Its states are never used, so its weights are not in the graph; the pooled text needs the second's."""
    names: dict[str, NDArray[Any]] = {}
    for role, last in (("text_encoder", 1), ("text_encoder_2", 2)):
        graph = onnx.load(xl_bundle.path(xl_bundle.component(role).graph), load_external_data=False).graph
        names[role] = np.array([f"layers.{last}." in tensor.name for tensor in graph.initializer])
    assert not names["text_encoder"].any()
    assert names["text_encoder_2"].any()


def test_base_and_refiner_from_the_command_line(
    base: tuple[References, Pipeline], refiner: tuple[References, Pipeline], tmp_path: Path
) -> None:
    """The file that is written is the picture of the two requests."""
    folders = [str(pipeline.bundle.folder) for _, pipeline in (base, refiner)]
    output = tmp_path / "picture.png"
    words = [folders[0], PROMPT, "--refiner", folders[1], "--refiner-start", "0.6", "--steps", "5"]
    words += ["--seed", "2", "--prompt-2", "oil", "--backend", "ort", "--quiet", "-o", str(output)]
    assert main(["generate", *words]) == 0
    begun = base[1].generate(
        PROMPT, prompt_2="oil", seed=2, num_inference_steps=5, denoising_end=0.6, output_type="latent"
    )
    wanted = refiner[1].generate(
        "oil", image=begun.latents, seed=2, num_inference_steps=5, denoising_start=0.6
    )
    assert psnr(np.asarray(wanted.images[0]), np.asarray(Image.open(output))) > 60
    assert read_parameters(output)["refiner"] == "refiner"


def test_a_benchmark_knows_the_checkpoint(xl_bundle: Bundle, xl_checkpoint: Path) -> None:
    """Its UNet reads the states of both text encoders, side by side."""
    asked = Asked((str(xl_bundle.folder),), backends=("ort",), checkpoint=xl_checkpoint)
    found = line_up(asked, table=True)
    assert (found.sdxl, found.notes) == (True, ())
