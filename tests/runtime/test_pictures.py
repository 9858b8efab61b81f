"""Pictures that are handed in: what is read, and what is refused before it can do harm."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from allaprima.bundle import Manifest, RequestError
from allaprima.runtime import Request
from allaprima.runtime.inpainting import Kept, grown, latent_mask
from allaprima.runtime.pictures import MOST_PIXELS, encodable, fitting_size, read_picture


def png(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def test_every_kind_of_source(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    image = Image.fromarray(array)
    path = tmp_path / "picture.png"
    path.write_bytes(png(image))
    for source in (array, image, path, str(path), path.read_bytes()):
        assert np.array_equal(np.asarray(read_picture(source)), array)


def test_transparency_becomes_white() -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert np.asarray(read_picture(png(image))).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 9, 9])
    assert read_picture(png(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_16_bits_are_scaled() -> None:
    """As depth maps have them; Pillow would make 255 of all that is above."""
    deep = Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16))
    for source in (deep, png(deep)):
        assert np.asarray(read_picture(source))[0, :, 1].tolist() == [0, 1, 128, 255]


def test_turned_as_the_camera_was() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    image = Image.new("RGB", (4, 2))
    assert read_picture(png(image, exif=exif)).size == (2, 4)


def bomb(width: int, height: int) -> bytes:
    """A small file whose header promises a large picture."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(bytes(1000))
    body = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return b"\x89PNG\r\n\x1a\n" + chunk + body


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"no picture", "image cannot be read: not a picture, or damaged"),
        (bomb(40_000, 25_000), f"image has too many pixels: at most {MOST_PIXELS} are taken"),
        (bomb(9000, 9000), f"image has 9000 x 9000 pixels: at most {MOST_PIXELS} are taken"),
        (bomb(30, 30), "image cannot be read: not a picture, or damaged"),
        ("nowhere.png", "image nowhere.png cannot be read: No such file"),
        (np.zeros((2, 2), np.uint8), r"image is uint8 \[2, 2\]: it should be uint8 \[height, width, 3\]"),
        (np.zeros((2, 2, 3), np.float32), "image is float32"),
        (Image.new("F", (2, 2)), "image has pixels of 32-bit floats: scale them to 8 or 16 bits"),
        (7, "image is a int: it should be a Pillow image"),
    ],
)
def test_what_is_refused(source: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_picture(source)


def test_sizes() -> None:
    assert fitting_size(Image.new("RGB", (200, 130)), 64) == (128, 192)
    with pytest.raises(RequestError, match=r"60 x 130 pixels, and the model needs at least 64 a side"):
        fitting_size(Image.new("RGB", (60, 130)), 64)


def test_encodable() -> None:
    array = np.zeros((4, 6, 3), np.uint8)
    array[..., 0] = 255
    values = encodable(Image.fromarray(array), 4, 6)
    assert values.shape == (1, 3, 4, 6)
    assert values.dtype == np.float32
    assert (values[0, 0] == 1).all()
    assert (values[0, 1:] == -1).all()


PICTURE = Image.new("RGB", (200, 130))


def test_a_request_with_a_picture(manifest: Manifest) -> None:
    multiple = manifest.latent.multiple
    settings = Request("x", image=PICTURE).check(manifest)
    assert (settings.height, settings.width) == (130 // multiple * multiple, 200 // multiple * multiple)
    assert settings.strength == 0.8
    assert Request("x", image=PICTURE, height=64, width=64).check(manifest).width == 64
    plain = Request("x").check(manifest)
    assert (plain.strength, plain.begin) == (None, 0)


@pytest.mark.parametrize(
    ("steps", "strength", "begin"), [(50, 0.8, 10), (10, 1.0, 0), (10, 0.1, 9), (7, 0.5, 4), (50, 0.29, 36)]
)
def test_steps_are_counted_as_in_diffusers(
    manifest: Manifest, steps: int, strength: float, begin: int
) -> None:
    request = Request("x", image=PICTURE, num_inference_steps=steps, strength=strength)
    assert request.check(manifest).begin == begin == steps - min(int(steps * strength), steps)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": 0.5}, "strength is 0.5, but there is no image to paint over"),
        ({"image": PICTURE, "strength": 1.5}, "strength is 1.5: it should lie between 0"),
        ({"image": PICTURE, "strength": -0.1}, "strength is -0.1: it should lie between 0"),
        ({"image": PICTURE, "strength": "much"}, "strength is 'much'"),
        (
            {"image": PICTURE, "strength": 0.05, "num_inference_steps": 10},
            "strength 0.05 of 10 steps is no step at all: raise it to 0.1 or more, or take more steps",
        ),
    ],
)
def test_wrong_strengths(manifest: Manifest, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request("x", **fields).check(manifest)


def test_masks(manifest: Manifest) -> None:
    mask = Image.new("L", PICTURE.size)
    mask.paste(255, (0, 0, 100, 130))
    settings = Request("x", image=PICTURE, mask=mask).check(manifest)
    assert settings.strength == 1.0
    assert settings.mask is not None
    assert Request("x", image=PICTURE, mask=mask, strength=0.4).check(manifest).strength == 0.4
    cut = latent_mask(settings.mask, 64, 96, 8)
    assert cut.shape == (8, 12)
    assert (cut[:, :6] == 1).all()
    assert (cut[:, 6:] == 0).all()
    with pytest.raises(RequestError, match=r"the mask has 10 x 20 pixels, the image 200 x 130: hand in two"):
        Request("x", image=PICTURE, mask=Image.new("L", (10, 20))).check(manifest)
    with pytest.raises(RequestError, match="there is a mask, but no image"):
        Request("x", mask=mask).check(manifest)
    with pytest.raises(RequestError, match="mask cannot be read: not a picture"):
        Request("x", image=PICTURE, mask=b"none").check(manifest)


def test_what_is_kept_is_put_back() -> None:
    kept = Kept(np.array([[1.0, 0.0]], np.float32), *np.float32([[[[[2.0, 2.0]]]], [[[[4.0, 4.0]]]]]))
    sample = np.full((1, 1, 1, 2), 9, np.float32)
    kept.put_back(sample, 0.5, 0.25)
    assert sample.ravel().tolist() == [9.0, 2.0]


def test_a_grown_mask_spreads_but_along_one_diagonal() -> None:
    mask = np.zeros((5, 6), np.float32)
    mask[2, 2] = 1
    wanted = np.zeros_like(mask)
    wanted[[1, 1, 2, 2, 2, 3, 3], [1, 2, 1, 2, 3, 2, 3]] = 1
    assert np.array_equal(grown(mask), wanted)
    assert mask.sum() == 1, "the mask itself stays"
    corner = np.zeros((2, 3), np.float32)
    corner[0, 0] = 1
    assert np.array_equal(grown(corner), [[1, 1, 0], [1, 1, 0]])
    assert np.array_equal(grown(np.ones((1, 1), np.float32)), [[1]])
