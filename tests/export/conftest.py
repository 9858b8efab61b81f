"""Checkpoints and their exports. An export takes most of a minute, so the whole run shares each of them."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    Kandinsky3UNet,
    PNDMScheduler,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from filelock import FileLock
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from allaprima.bundle import Bundle, BundleWriter, open_bundle, resolve
from allaprima.export import export_checkpoint, graph
from allaprima.export.checkpoint import _export_component as export_component
from allaprima.export.checkpoint import _Stages as Stages
from allaprima.export.source import open_checkpoint
from allaprima.export.stable_diffusion import read_family

from .traces import shared

SHAPES = Path(__file__).parents[2] / "models" / "shapes" / "checkpoint"


def _text_config(tokenizer: CLIPTokenizer, width: int, **fields: int) -> CLIPTextConfig:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        **{"num_hidden_layers": 2, "num_attention_heads": 4, **ids, **fields},
    )


def _unet(**fields: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        **{
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            **fields,
        },
    )


def _vae(**fields: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=128,
        **fields,
    )


def _save(folder: Path, models: Mapping[str, Any], index: Mapping[str, Any], scheduler: Any) -> Path:
    """Write models with distinct random weights, and the index.

    Weights have the 8 bits that all formats hold: a bundle in fp16, computed in float32, is the very model.
    """
    for name, model in models.items():
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
                weight.copy_(weight.bfloat16())
        model.save_pretrained(folder / name)
    scheduler.save_pretrained(folder / "scheduler")
    kinds = {
        name: [type(part).__module__.partition(".")[0], type(part).__name__]
        for name, part in {**models, "scheduler": scheduler}.items()
    }
    (folder / "model_index.json").write_text(json.dumps({**index, **kinds}))
    return folder


def write_tiny(folder: Path, *, kind: str = "StableDiffusionPipeline", **unet: Any) -> Path:
    """A Stable Diffusion checkpoint with tiny networks and distinct random weights."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    models = {
        "text_encoder": CLIPTextModel(_text_config(tokenizer, 32)),
        "unet": _unet(**unet),
        "vae": _vae(),
    }
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    index = json.loads((SHAPES / "model_index.json").read_text())
    return _save(folder, models, {**index, "_class_name": kind}, scheduler)


def write_tiny_xl(folder: Path, *, refiner: bool = False, **unet: Any) -> Path:
    """An SDXL checkpoint, or a refiner's, with tiny networks and distinct random weights.

    The second tokenizer pads with "!", and its padding and its end are other tokens than the first one's.
    """
    torch.manual_seed(1)
    first = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")
    second = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer", pad_token="!")
    second.save_pretrained(folder / "tokenizer_2")
    # Three heads of 16: TensorRT-RTX 1.7 compiles no attention with heads of 12. The published configuration
    # has an end token that is none, which transformers takes for "the largest id".
    widened = _text_config(
        second, 48, num_hidden_layers=3, num_attention_heads=3, projection_dim=40, eos_token_id=2
    )
    models: dict[str, Any] = {"text_encoder_2": CLIPTextModelWithProjection(widened)}
    if not refiner:
        first.save_pretrained(folder / "tokenizer")
        models["text_encoder"] = CLIPTextModel(_text_config(first, 32))
    models["unet"] = _unet(
        **{
            "cross_attention_dim": 48 if refiner else 80,
            "attention_head_dim": (4, 8),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 40 + 8 * (5 if refiner else 6),
            **unet,
        }
    )
    models["vae"] = _vae(scaling_factor=0.13025, force_upcast=True)
    kind = "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline"
    index = {
        "_class_name": kind,
        "force_zeros_for_empty_prompt": not refiner,
        "tokenizer": [None, None] if refiner else ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "text_encoder": [None, None],
    }
    if refiner:
        index["requires_aesthetics_score"] = True
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    return _save(folder, models, index, scheduler)


def write_tiny_prior(folder: Path, *, embedding: int = 32) -> Path:
    """The prior of a Kandinsky 2.2 with tiny networks and distinct random weights."""
    torch.manual_seed(2)
    tokenizer = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    CLIPImageProcessor(crop_size=28, size={"shortest_edge": 28}).save_pretrained(folder / "image_processor")
    # Heads of 104, as the published model has them.
    vision = CLIPVisionConfig(
        hidden_size=208,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=embedding,
    )
    # Heads of 16: TensorRT-RTX 1.7 compiles no attention with heads of 12.
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        embedding_dim=embedding,
        num_embeddings=77,
        additional_embeddings=4,
    )
    with torch.no_grad():
        prior.clip_std.fill_(1.0)  # zero in a new model, which then makes nothing
        prior.prd_embedding.normal_()
    models = {
        "prior": prior,
        "text_encoder": CLIPTextModelWithProjection(
            _text_config(tokenizer, embedding, num_attention_heads=2, projection_dim=embedding)
        ),
        "image_encoder": CLIPVisionModelWithProjection(vision),
    }
    index = {
        "_class_name": "KandinskyV22PriorPipeline",
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "image_processor": ["transformers", "CLIPImageProcessor"],
    }
    scheduler = UnCLIPScheduler(
        variance_type="fixed_small_log",
        num_train_timesteps=1000,
        clip_sample=True,
        clip_sample_range=10.0,
        prediction_type="sample",
    )
    return _save(folder, models, index, scheduler)


def write_tiny_kandinsky(folder: Path, *, kind: str = "KandinskyV22Pipeline", **unet: Any) -> Path:
    """The decoder of a Kandinsky 2.2 with tiny networks and distinct random weights.

    Spatial norms have 32 groups whatever is configured, so no level has fewer channels.
    """
    torch.manual_seed(3)
    models = {
        "unet": UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
            addition_embed_type_num_heads=64,
            encoder_hid_dim_type="image_proj",
            **{
                "out_channels": 8,
                "attention_head_dim": 16,
                "cross_attention_dim": 32,
                "encoder_hid_dim": 32,
                "addition_embed_type": "image",
                **unet,
            },
        ),
        "movq": VQModel(
            block_out_channels=(32, 32, 64),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            vq_embed_dim=4,
            num_vq_embeddings=32,
            layers_per_block=1,
            norm_num_groups=32,
            norm_type="spatial",
        ),
    }
    for layer in models["unet"].add_embedding.modules():
        if isinstance(layer, torch.nn.Conv2d):  # of a hint, which would fade away in a new model
            torch.nn.init.normal_(layer.weight, std=1.6 / layer.weight[0].numel() ** 0.5)
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False
    )
    return _save(folder, models, {"_class_name": kind}, scheduler)


def make_t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer with a vocabulary of its own, which has few whole words."""
    captions = (
        "a small red circle above a blue square on a white background",
        "a green star left of a yellow triangle, and a black ring",
        "two purple dots under a thin line; 12 stripes!",
    )
    trained = tokenizers.Tokenizer(tokenizers.models.Unigram())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()]
    )
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=100, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(captions * 20, trainer)
    vocabulary = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=vocabulary, extra_ids=4)


def write_tiny_kandinsky3(folder: Path, *, kind: str = "Kandinsky3Pipeline", **unet: Any) -> Path:
    """A Kandinsky 3 with tiny networks and distinct random weights.

    Two groups in each norm of the UNet: norms of a few numbers would make it chaotic. Spatial norms of the
    autoencoder have 32 groups whatever is configured.
    """
    torch.manual_seed(4)
    tokenizer = make_t5_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    models = {
        "text_encoder": T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=32,
                d_kv=16,
                d_ff=64,
                num_layers=2,
                num_heads=2,
                dense_act_fn="silu",
                feed_forward_proj="gated-silu",
            )
        ),
        "unet": Kandinsky3UNet(
            **{
                "time_embedding_dim": 64,
                "groups": 2,
                "attention_head_dim": 16,
                "layers_per_block": 2,
                "block_out_channels": (32, 64),
                "cross_attention_dim": 32,
                "encoder_hid_dim": 32,
                **unet,
            }
        ),
        "movq": VQModel(
            block_out_channels=(32, 32, 32, 64),
            down_block_types=(*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
            latent_channels=4,
            vq_embed_dim=4,
            num_vq_embeddings=32,
            layers_per_block=1,
            norm_num_groups=32,
            norm_type="spatial",
        ),
    }
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=True,
        clip_sample_range=1.0,
        timestep_spacing="leading",
        steps_offset=1,
    )
    index = {"_class_name": kind, "tokenizer": ["transformers", "T5Tokenizer"]}
    return _save(folder, models, index, scheduler)


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Folders that the first who asks makes, for all processes of the run: pytest-xdist has several."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def make(name: str, write: Callable[[Path], object]) -> Path:
        folder = shared / "once" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        done = folder.with_name(f"{folder.name}.done")
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not done.exists():
                write(folder)
                done.touch()
        return folder

    return make


Export = Callable[..., Bundle]


@pytest.fixture(scope="session")
def export(once: Once) -> Export:
    """A checkpoint's bundle of this name and precision; what several have alike is traced once."""
    trace = shared(graph._trace, once)

    def make(checkpoint: Path, name: str, precision: str, **options: Any) -> Bundle:
        def write(folder: Path) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(graph, "_trace", trace)
                export_checkpoint(str(checkpoint), folder, precision=precision, **options)

        return open_bundle(once(f"bundles/{name}", write))

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(once: Once) -> Path:
    return once("checkpoints/tiny", write_tiny)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, export: Export) -> Bundle:
    """The tiny checkpoint in float32."""
    return export(tiny_checkpoint, "tiny", "fp32")


@pytest.fixture(scope="session")
def tiny_half_bundle(tiny_checkpoint: Path, export: Export) -> Bundle:
    """The tiny checkpoint in float16."""
    return export(tiny_checkpoint, "half", "fp16")


@pytest.fixture(scope="session")
def tiny_bf16_bundle(tiny_checkpoint: Path, export: Export) -> Bundle:
    """The tiny checkpoint in bfloat16."""
    return export(tiny_checkpoint, "bf16", "bf16")


@pytest.fixture(scope="session")
def shapes_bundle() -> Bundle:
    """The project's own model, as it is shipped: computed in float32 it has the weights of the checkpoint."""
    return open_bundle(resolve("shapes"))


@pytest.fixture(scope="session")
def xl_checkpoint(once: Once) -> Path:
    return once("checkpoints/xl", write_tiny_xl)


@pytest.fixture(scope="session")
def xl_bundle(xl_checkpoint: Path, export: Export) -> Bundle:
    """The tiny SDXL in float16; ONNX Runtime computes it in float32 unless asked."""
    return export(xl_checkpoint, "xl", "fp16")


@pytest.fixture(scope="session")
def cached_checkpoint(once: Once) -> Path:
    """A tiny one with attention in the outermost level, as Stable Diffusion has it."""
    return once(
        "checkpoints/cached",
        lambda folder: write_tiny(
            folder,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
    )


@pytest.fixture(scope="session")
def cached_bundle(cached_checkpoint: Path, export: Export) -> Bundle:
    """It in float32, with the graphs of a cached step."""
    return export(cached_checkpoint, "cached", "fp32", step_cache=1)


@pytest.fixture(scope="session")
def xl_cached_bundle(xl_checkpoint: Path, xl_bundle: Bundle, once: Once) -> Bundle:
    """The tiny SDXL in float16 with the graphs of a cached step, which alone are exported anew."""

    def write(folder: Path) -> None:
        family = replace(read_family(open_checkpoint(str(xl_checkpoint))), step_cache=1)
        manifest = xl_bundle.manifest
        with BundleWriter(folder) as writer:
            shutil.copytree(xl_bundle.folder, writer.folder, dirs_exist_ok=True)
            (writer.folder / "bundle.json").unlink()
            made = {
                role: export_component(make, role, "fp16", family, writer.folder, Stages(None, 0))
                for role, make in family.plans(torch.float16).items()
                if role not in manifest.components
            }
            writer.commit(replace(manifest, components={**manifest.components, **made}))

    return open_bundle(once("bundles/xl-cached", write))


@pytest.fixture(scope="session")
def refiner_checkpoint(once: Once) -> Path:
    return once("checkpoints/refiner", lambda folder: write_tiny_xl(folder, refiner=True))


@pytest.fixture(scope="session")
def refiner_bundle(refiner_checkpoint: Path, export: Export) -> Bundle:
    """The tiny refiner in float32."""
    return export(refiner_checkpoint, "refiner", "fp32")


@pytest.fixture(scope="session")
def prior_checkpoint(once: Once) -> Path:
    return once("checkpoints/prior", write_tiny_prior)


@pytest.fixture(scope="session")
def kandinsky_checkpoint(once: Once) -> Path:
    return once("checkpoints/decoder", write_tiny_kandinsky)


@pytest.fixture(scope="session")
def kandinsky_bundle(kandinsky_checkpoint: Path, prior_checkpoint: Path, export: Export) -> Bundle:
    """The tiny Kandinsky 2.2 in float16 (see `xl_bundle`), with its image encoder."""
    return export(kandinsky_checkpoint, "kandinsky", "fp16", prior=str(prior_checkpoint), image_encoder=True)


@pytest.fixture(scope="session")
def depth_checkpoint(once: Once) -> Path:
    return once(
        "checkpoints/depth",
        lambda folder: write_tiny_kandinsky(
            folder, kind="KandinskyV22ControlnetPipeline", in_channels=8, addition_embed_type="image_hint"
        ),
    )


@pytest.fixture(scope="session")
def depth_bundle(depth_checkpoint: Path, prior_checkpoint: Path, export: Export) -> Bundle:
    """A tiny Kandinsky 2.2 that follows a depth map, in float32, without image encoder."""
    return export(depth_checkpoint, "depth", "fp32", prior=str(prior_checkpoint))


@pytest.fixture(scope="session")
def kandinsky3_checkpoint(once: Once) -> Path:
    return once("checkpoints/kandinsky3", write_tiny_kandinsky3)


@pytest.fixture(scope="session")
def kandinsky3_bundle(kandinsky3_checkpoint: Path, export: Export) -> Bundle:
    """The tiny Kandinsky 3 in float16 (see `xl_bundle`), its text encoder in bfloat16."""
    return export(kandinsky3_checkpoint, "kandinsky3", "fp16")
