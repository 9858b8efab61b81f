"""Pictures in files, with how they were made."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from allaprima.bundle import RequestError
from allaprima.runtime.result import Parameters
from allaprima.runtime.samplers import find

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
TEXT, DATA = "parameters", "allaprima"
"""Names of the two PNG chunks: text in the convention of AUTOMATIC1111's web UI, and JSON."""

_EXIF, _USER_COMMENT, _MAKER_NOTE = 0x8769, 0x9286, 0x927C
_UNICODE = b"UNICODE\0"


def check_writable(path: str | Path) -> None:
    """Check that a picture can be saved there, before it is painted.

    Raises RequestError: unknown suffix, no such folder, or not writable.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise RequestError(f"{path}: unknown kind of picture '{path.suffix}', use {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise RequestError(f"{path}: there is no folder {path.parent}, make it first")
    if path.is_dir():
        raise RequestError(f"{path} is a folder: name a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise RequestError(f"{path}: the folder {path.parent} is not writable")


def save_image(image: Image.Image, path: str | Path, parameters: Parameters) -> None:
    """Save a picture with its parameters, in the format of the suffix (.png .jpg .jpeg .webp).

    The file appears whole or not at all. PNG holds the chunks "parameters" and "allaprima"; the other formats
    hold the same in the EXIF fields UserComment and MakerNote. JPEG alone loses quality.

    Raises RequestError as `check_writable`, or if the disk refuses.
    """
    check_writable(path)
    kind = FORMATS[Path(path).suffix.lower()]
    _write(image, path, **_options(kind, parameters))


def encode_image(
    image: Image.Image,
    kind: str,
    parameters: Parameters | None = None,
    *,
    quality: int | None = None,
    compress_level: int | None = None,
) -> bytes:
    """A picture as the contents of a file, "PNG", "JPEG" or "WEBP", with its parameters as `save_image`.

    `quality`, from 0 to 100, is for JPEG and WebP, which else lose next to nothing and nothing;
    `compress_level`, from 0 to 9, for PNG: 1 is several times faster than Pillow's 6.
    """
    options = _options(kind, parameters)
    if quality is not None and kind != "PNG":
        options |= {"quality": quality, "lossless": False} if kind == "WEBP" else {"quality": max(quality, 1)}
    if compress_level is not None and kind == "PNG":
        options["compress_level"] = compress_level
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def save_preview(image: Image.Image, path: str | Path) -> None:
    """Save a small picture of one that is being painted, over the one before; it does not say how it is made.

    Raises RequestError as `save_image`.
    """
    check_writable(path)
    _write(image, path)


def _write(image: Image.Image, path: str | Path, **options: Any) -> None:
    """Whole or not at all: to another name first."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        image.save(partial, format=FORMATS[path.suffix.lower()], **options)
        partial.replace(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def read_parameters(path: str | Path) -> Mapping[str, Any]:
    """What a picture says about how it was made: the fields of Parameters.

    A picture by another program that keeps to AUTOMATIC1111's convention gives {"parameters": its text}.

    Raises RequestError if it cannot be read, is no picture, or says nothing.
    """
    try:
        with Image.open(path) as image:
            text, data = _read(image)
        fields = json.loads(data) if data else None
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError is Pillow's word for a broken PNG
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a picture, or damaged"
        raise RequestError(f"{path} cannot be read: {reason}") from error
    if isinstance(fields, dict):
        return fields
    if text:
        return {TEXT: text}
    raise RequestError(f"{path} does not say how it was made")


def describe(parameters: Parameters) -> str:
    """Parameters as text, in the convention of AUTOMATIC1111's web UI, which many programs read."""
    p = parameters
    settings = {
        "Steps": p.num_inference_steps,
        "Sampler": find(p.sampler).title,
        "CFG scale": f"{p.guidance_scale:g}",
        "Seed": p.seed,
        "Size": f"{p.width}x{p.height}",
        **({} if p.strength is None else {"Denoising strength": f"{p.strength:g}"}),
        **_variation(p),
        **({} if p.refiner is None else {"Refiner": p.refiner, "Refiner switch at": f"{p.denoising_end:g}"}),
        **({} if p.cache_interval == 1 else {"Cache interval": p.cache_interval}),
        "Model": p.bundle,
        "Version": f"allaprima {p.version}",
    }
    lines = [p.prompt]
    if p.negative_prompt:
        lines.append(f"Negative prompt: {p.negative_prompt}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in settings.items())])


def _variation(parameters: Parameters) -> dict[str, object]:
    if parameters.variation_seed is None:
        return {}
    strength = f"{parameters.variation_strength:g}"
    return {"Variation seed": parameters.variation_seed, "Variation seed strength": strength}


def _options(kind: str, parameters: Parameters | None) -> dict[str, Any]:
    best: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True},
    }
    if parameters is None:
        return best.get(kind, {})
    text, data = describe(parameters), json.dumps(asdict(parameters))
    if kind == "PNG":
        info = PngInfo()
        info.add_text(TEXT, text)  # tEXt, or iTXt where Latin-1 does not reach
        info.add_text(DATA, data)
        return {"pnginfo": info}
    exif = Image.Exif()
    exif.get_ifd(_EXIF).update(
        {_USER_COMMENT: _UNICODE + text.encode("utf-16-be"), _MAKER_NOTE: data.encode()}
    )
    return {"exif": exif, **best[kind]}


def _read(image: Image.Image) -> tuple[str, str]:
    """The text and the JSON in a picture, "" for what it lacks."""
    if image.format == "PNG":
        image.load()  # the chunks may come after the pixels
        info = image.info
        return str(info.get(TEXT, "")), str(info.get(DATA, ""))
    exif = image.getexif().get_ifd(_EXIF)
    comment, note = exif.get(_USER_COMMENT, b""), exif.get(_MAKER_NOTE, b"")
    text = comment.removeprefix(_UNICODE).decode("utf-16-be") if isinstance(comment, bytes) else ""
    return text, note.decode("utf-8", "replace") if isinstance(note, bytes) else ""
