"""Pictures in files."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from allaprima.bundle import RequestError
from allaprima.runtime import Parameters, check_writable, read_parameters, save_image

PARAMETERS = Parameters(
    prompt="a red circle, (blue:1.2)",
    negative_prompt="text",
    num_inference_steps=20,
    guidance_scale=5.0,
    sampler="dpmpp_2m",
    seed=7,
    height=16,
    width=24,
    eta=0.0,
    bundle="shapes",
    backend="ort",
    precision="fp32",
    version="0.1.0",
)
UNICODE = replace(PARAMETERS, prompt='ein Kreis\n東京 🎨: \\ "', negative_prompt="", seed=2**64 - 1)


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("parameters", [PARAMETERS, UNICODE])
@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".webp"])
def test_parameters_come_back(
    image: Image.Image, tmp_path: Path, suffix: str, parameters: Parameters
) -> None:
    path = tmp_path / f"picture{suffix}"
    save_image(image, path, parameters)
    assert read_parameters(path) == asdict(parameters)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with Image.open(path) as loaded:
        assert loaded.size == (24, 16)
        if suffix.lower() in (".png", ".webp"):
            assert np.array_equal(np.asarray(loaded.convert("RGB")), np.asarray(image))


def test_chunks(image: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    save_image(image, str(path), PARAMETERS)
    with Image.open(path) as loaded:
        assert loaded.info["parameters"] == (
            "a red circle, (blue:1.2)\n"
            "Negative prompt: text\n"
            "Steps: 20, Sampler: DPM++ 2M, CFG scale: 5, Seed: 7, Size: 24x16, Model: shapes, "
            "Version: allaprima 0.1.0"
        )
        assert json.loads(loaded.info["allaprima"])["seed"] == 7


def test_chunks_of_variations_and_repainted_pictures(image: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    changes = {"strength": 0.6, "variation_seed": 9, "variation_strength": 0.25}
    save_image(image, path, replace(PARAMETERS, **changes))
    with Image.open(path) as loaded:
        words = "Denoising strength: 0.6, Variation seed: 9, Variation seed strength: 0.25, Model: shapes"
        assert words in loaded.info["parameters"]


def test_no_negative_prompt(image: Image.Image, tmp_path: Path) -> None:
    save_image(image, tmp_path / "a.png", replace(PARAMETERS, negative_prompt="", guidance_scale=7.25))
    with Image.open(tmp_path / "a.png") as loaded:
        text = loaded.info["parameters"]
    assert "Negative" not in text
    assert "CFG scale: 7.25," in text


def test_replaces_a_file(image: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_text("old")
    save_image(image, path, PARAMETERS)
    assert read_parameters(path)["seed"] == 7


def test_failure_leaves_nothing(image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    path.write_text("old")

    def fail(self: Image.Image, file: Path, **_: object) -> None:
        file.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(RequestError, match=r"picture\.png cannot be written: No space left on device"):
        save_image(image, path, PARAMETERS)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("picture.tiff", r"unknown kind of picture '\.tiff', use \.png, \.jpg"),
        ("picture", "unknown kind of picture ''"),
        ("missing/picture.png", "there is no folder .*missing, make it first"),
        ("folder.png", "is a folder: name a file"),
    ],
)
def test_not_writable(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(RequestError, match=message):
        check_writable(tmp_path / name)


def test_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_writable("picture.webp")
    assert not list(tmp_path.iterdir())


def test_unreadable(image: Image.Image, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        read_parameters(tmp_path / "none.png")
    path = tmp_path / "a.png"
    path.write_text("no picture")
    with pytest.raises(RequestError, match="cannot be read: not a picture, or damaged"):
        read_parameters(path)
    for suffix in (".png", ".jpg", ".webp"):
        image.save(tmp_path / f"b{suffix}")
        with pytest.raises(RequestError, match="does not say how it was made"):
            read_parameters(tmp_path / f"b{suffix}")
    save_image(image, path, PARAMETERS)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(RequestError, match="cannot be read: not a picture, or damaged"):
        read_parameters(path)


def test_picture_of_another_program(image: Image.Image, tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 3")
    image.save(tmp_path / "cat.png", pnginfo=info)
    assert read_parameters(tmp_path / "cat.png") == {"parameters": "a cat\nSteps: 3"}
