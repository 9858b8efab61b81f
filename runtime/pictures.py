"""Pictures that are handed in: opened with care, and made into what the image encoder takes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from allaprima.bundle import Latent, RequestError
from allaprima.runtime.conventions import USUAL, Conventions

Source = Image.Image | NDArray[np.uint8] | bytes | str | Path
"""A Pillow image, an array [height,width,3] of 8 bits, a file's contents, or its path."""
MOST_PIXELS = 1 << 26
"""A larger picture is refused by what its header says, before anything is unpacked."""


def read_picture(source: Source, name: str = "image") -> Image.Image:
    """The picture as RGB, turned as its EXIF data says; what is transparent becomes white.

    Raises RequestError: not a picture, damaged, or of more than `MOST_PIXELS` pixels.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise RequestError(
                f"{name} is {source.dtype} {list(source.shape)}: it should be uint8 [height, width, 3]"
            )
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, name)
    if not isinstance(source, (bytes, str, Path)):
        raise RequestError(
            f"{name} is a {type(source).__name__}: it should be a Pillow image, an array, a file's "
            "contents, or its path"
        )
    what = f"{name} {source}" if isinstance(source, (str, Path)) else name
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            _check_size(opened, what)
            return _to_rgb(opened, what)
    except Image.DecompressionBombError as cause:
        raise RequestError(f"{what} has too many pixels: at most {MOST_PIXELS} are taken") from cause
    except (OSError, ValueError, SyntaxError) as cause:
        told = cause.strerror if isinstance(cause, OSError) else None
        raise RequestError(f"{what} cannot be read: {told or 'not a picture, or damaged'}") from cause


def read_latents(values: NDArray[np.generic], latent: Latent) -> NDArray[np.float32]:
    """Latents [N,C,H,W], or [C,H,W] of one picture, as they were handed in, in float32.

    Raises RequestError: another shape than the model's, or values that are not finite.
    """
    found = values[None] if values.ndim == 3 else values
    step = latent.multiple // latent.downscale
    floating = np.issubdtype(values.dtype, np.floating)
    if not floating or found.ndim != 4 or found.shape[1] != latent.channels or 0 in found.shape:
        raise RequestError(
            f"image is {values.dtype} {list(values.shape)}: it should be uint8 [height, width, 3], "
            f"or latents, float32 [images, {latent.channels}, height / {latent.downscale}, "
            f"width / {latent.downscale}]"
        )
    if found.shape[2] % step or found.shape[3] % step:
        raise RequestError(f"the latents {list(values.shape)} should have sides of multiples of {step}")
    if not np.isfinite(found).all():
        raise RequestError("the latents hold values that are not finite numbers")
    return np.ascontiguousarray(found, np.float32)


def _check_size(image: Image.Image, what: str) -> None:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise RequestError(
            f"{what} has {width} x {height} pixels: at most {MOST_PIXELS} are taken, make it smaller"
        )


def _to_rgb(image: Image.Image, what: str) -> Image.Image:
    _check_size(image, what)
    turned = ImageOps.exif_transpose(image)
    if turned.mode == "F":
        raise RequestError(f"{what} has pixels of 32-bit floats: scale them to 8 or 16 bits")
    if turned.mode.startswith("I"):  # 16 bits, as of depth maps, which Pillow would cut off at 8
        turned = Image.fromarray(np.rint(np.asarray(turned).clip(0, 65535) / 257).astype(np.uint8))
    if "A" in turned.getbands() or "transparency" in turned.info:
        with_alpha = turned.convert("RGBA")
        ground = Image.new("RGBA", with_alpha.size, "white")
        turned = Image.alpha_composite(ground, with_alpha)
    return turned.convert("RGB")


def fitting_size(image: Image.Image, multiple: int) -> tuple[int, int]:
    """Height and width of a picture, rounded down to multiples; RequestError if nothing is left."""
    width, height = (side // multiple * multiple for side in image.size)
    if not (width and height):
        raise RequestError(
            f"image has {image.size[0]} x {image.size[1]} pixels, and the model needs at least {multiple} a "
            "side: make it larger, or name a size"
        )
    return height, width


def encodable(
    image: Image.Image, height: int, width: int, conventions: Conventions = USUAL
) -> NDArray[np.float32]:
    """[1,3,height,width] in [-1,1], resized as diffusers' pipelines of the family do it."""
    gap = conventions.reducing_gap
    resized = image.resize((width, height), conventions.filter, reducing_gap=gap)
    values = np.asarray(resized, np.float32) / 255
    return np.ascontiguousarray((2 * values - 1).transpose(2, 0, 1)[None])
