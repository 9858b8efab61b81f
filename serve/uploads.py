"""Pictures that clients send: looked at before they are unpacked.

What they are is told by their first bytes, never by a file name or what the client says; there are three
kinds, and each is opened by its own decoder only.
"""

from __future__ import annotations

import base64
import binascii
import io

from PIL import Image, ImageOps

from allaprima.bundle import RequestError
from allaprima.runtime.pictures import read_picture

_DATA = "data:image/"


def read_upload(data: bytes, name: str, most: int) -> Image.Image:
    """A PNG, JPEG or WebP file as RGB; what is transparent becomes white.

    Raises RequestError: another kind, damaged, or of more than `most` pixels, which its header tells.
    """
    with _open(data, name, most) as opened:
        return read_picture(_unpack(opened, name), name)


def read_alpha_mask(data: bytes, name: str, most: int) -> Image.Image:
    """The mask of OpenAI's API, whose transparent pixels are painted over, as ours: white is painted over.

    Raises RequestError as `read_upload`, or if nothing says what is transparent.
    """
    with _open(data, name, most) as opened:
        turned = _unpack(opened, name)
        if "A" not in turned.getbands() and "transparency" not in turned.info:
            raise RequestError(
                f"{name} has no alpha channel: make the part transparent that is to be painted over"
            )
        alpha = turned.convert("RGBA").getchannel("A")
        return alpha.point([255 - value for value in range(256)])


def decode_base64(text: str, name: str) -> bytes:
    """The bytes of base64, plain or as a data URL of a picture. Raises RequestError."""
    if text.startswith(_DATA):
        head, separator, text = text.partition(",")
        if not separator or not head.endswith(";base64"):
            raise RequestError(f"{name} is a data URL without base64: write data:image/png;base64,...")
    elif "://" in text[:16]:
        raise RequestError(f"{name} is a URL: pictures are not fetched, send them as base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as cause:
        raise RequestError(f"{name} is not base64: {cause}") from cause


def _kind(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _open(data: bytes, name: str, most: int) -> Image.Image:
    """With its header read, and no more."""
    kind = _kind(data)
    if kind is None:
        raise RequestError(f"{name} is no PNG, JPEG or WebP file: send one of these")
    try:
        opened = Image.open(io.BytesIO(data), formats=(kind,))
    except Image.DecompressionBombError as cause:
        raise RequestError(f"{name} has too many pixels: at most {most} are taken") from cause
    except (OSError, ValueError, SyntaxError) as cause:
        raise RequestError(f"{name} is a damaged {kind} file") from cause
    width, height = opened.size
    if width * height > most:
        opened.close()
        raise RequestError(f"{name} has {width} x {height} pixels: at most {most} are taken, make it smaller")
    return opened


def _unpack(opened: Image.Image, name: str) -> Image.Image:
    try:
        opened.load()
        turned = ImageOps.exif_transpose(opened)
    except (OSError, ValueError, SyntaxError) as cause:
        raise RequestError(f"{name} is a damaged {opened.format} file") from cause
    return turned
