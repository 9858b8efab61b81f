"""What all tests share: a cache of their own, and a small bundle whose graphs are not ONNX, only files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from allaprima.bundle import (
    SCHEMA,
    BundleWriter,
    Component,
    Defaults,
    Latent,
    Manifest,
    Parity,
    TensorSpec,
    TokenizerSpec,
)

FILES = {
    "denoiser/model.onnx": b"graph",
    "denoiser/weights.safetensors": b"weights" * 1000,
    "tokenizer/tokenizer.json": b"{}",
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine cache that does not exist yet, in place of the user's."""
    folder = tmp_path_factory.mktemp("cache") / "engines"
    monkeypatch.setenv("ALLAPRIMA_CACHE", str(folder))
    return folder


@pytest.fixture
def manifest() -> Manifest:
    """A manifest with one component, as a writer wants it: without files."""
    denoiser = Component(
        graph="denoiser/model.onnx",
        precision="fp16",
        inputs=(
            TensorSpec("sample", "float32", ("B", 4, "H", "W")),
            TensorSpec("timestep", "float32", ("B",)),
        ),
        outputs=(TensorSpec("next_sample", "float32", ("B", 4, "H", "W")),),
        parity=(Parity({"sample": (2, 4, 8, 12), "timestep": (2,)}, max_abs=1e-3, relative=2.5e-3),),
    )
    return Manifest(
        schema=SCHEMA,
        name="tiny",
        family="stable-diffusion",
        precision="fp16",
        components={"denoiser": denoiser},
        tokenizers={
            "text_encoder": TokenizerSpec("tokenizer/tokenizer.json", length=77, bos=0, eos=1, pad=1)
        },
        zero_negative=False,
        scheduler={"_class_name": "DDIMScheduler", "trained_betas": None, "beta_start": 0.00085},
        latent=Latent(channels=4, downscale=8, multiple=64),
        preview=None,
        defaults=Defaults(height=128, width=128, num_inference_steps=20, guidance_scale=5.0),
        history=4,
        versions={"allaprima": "0.1.0"},
    )


WriteBundle = Callable[..., Path]


@pytest.fixture
def write_bundle(manifest: Manifest) -> WriteBundle:
    """write_bundle(target, overwrite=False, files=FILES): a committed bundle at `target`."""

    def write(target: Path, *, overwrite: bool = False, files: dict[str, bytes] = FILES) -> Path:
        with BundleWriter(target, overwrite=overwrite) as writer:
            for name, data in files.items():
                path = writer.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            writer.commit(manifest)
        return target

    return write
