"""Pictures that clients send, and what pretends to be one."""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import pytest
from PIL import Image

from allaprima.bundle import RequestError
from allaprima.serve.uploads import decode_base64, read_alpha_mask, read_upload

MOST = 1 << 16


def packed(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RED = Image.new("RGB", (16, 8), "red")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_three_kinds(kind: str) -> None:
    image = read_upload(packed(RED, kind), "image", MOST)
    assert (image.mode, image.size) == ("RGB", (16, 8))
    red, green, blue = image.getpixel((4, 4))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 20


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PDF", "EPS"])
def test_no_other_kinds(kind: str) -> None:
    with pytest.raises(RequestError, match="no PNG, JPEG or WebP"):
        read_upload(packed(RED, kind), "image", MOST)


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS", b"RIFF0000WAVE"]
)
def test_no_picture(data: bytes) -> None:
    with pytest.raises(RequestError, match="no PNG, JPEG or WebP"):
        read_upload(data, "image", MOST)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_damaged(kind: str, share: float) -> None:
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    data = packed(noise, kind)
    with pytest.raises(RequestError, match=f"damaged {kind}"):
        read_upload(data[: int(len(data) * share)], "image", MOST)


def test_a_header_that_begins_as_another_kind() -> None:
    """The decoder is that of the first bytes, whatever follows."""
    with pytest.raises(RequestError, match="damaged PNG"):
        read_upload(b"\x89PNG\r\n\x1a\n" + packed(RED, "JPEG"), "image", MOST)


def test_the_header_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was unpacked"))
    with pytest.raises(RequestError, match=r"60000 x 60000 pixels|too many pixels"):
        read_upload(_bomb(60000), "image", MOST)
    with pytest.raises(RequestError, match="300 x 300 pixels: at most 65536"):
        read_upload(_bomb(300), "image", MOST)


def _bomb(side: int) -> bytes:
    """A PNG that says it is large, and is not."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    header = side.to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_turned_as_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_upload(packed(RED, "JPEG", exif=exif), "image", MOST).size == (8, 16)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_that_is_none(kind: str) -> None:
    data = packed(RED, kind, exif=b"Exif\x00\x00nothing of the kind")
    with pytest.raises(RequestError, match=f"image is a damaged {kind} file"):
        read_upload(data, "image", MOST)


def test_transparent_is_painted_over() -> None:
    mask = Image.new("RGBA", (2, 1))
    mask.putpixel((0, 0), (255, 255, 255, 0))
    mask.putpixel((1, 0), (0, 0, 0, 255))
    read = read_alpha_mask(packed(mask, "PNG"), "mask", MOST)
    assert read.mode == "L"
    assert [read.getpixel((x, 0)) for x in range(2)] == [255, 0]


def test_a_palette_may_be_transparent() -> None:
    mask = Image.new("P", (2, 1), 0)
    mask.putpixel((1, 0), 1)
    mask.putpalette([0, 0, 0, 255, 255, 255])
    read = read_alpha_mask(packed(mask, "PNG", transparency=1), "mask", MOST)
    assert [read.getpixel((x, 0)) for x in range(2)] == [0, 255]


def test_a_mask_says_what_is_transparent() -> None:
    with pytest.raises(RequestError, match="no alpha channel"):
        read_alpha_mask(packed(RED, "PNG"), "mask", MOST)


def test_base64() -> None:
    text = base64.b64encode(b"abc").decode()
    assert decode_base64(text, "image") == b"abc"
    assert decode_base64(f"data:image/webp;base64,{text}", "image") == b"abc"
    for bad, told in (("a", "not base64"), ("é", "not base64"), ("data:image/png,x", "without base64")):
        with pytest.raises(RequestError, match=told):
            decode_base64(bad, "image")
    with pytest.raises(RequestError, match="not fetched"):
        decode_base64("file:///etc/passwd", "image")
