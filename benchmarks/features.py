"""Features of pictures and texts, by models that the user has: none comes with this package."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allaprima.benchmarks.likeness import Picture
from allaprima.bundle import RequestError

F32 = NDArray[np.float32]
Features = Callable[[F32], F32]
"""From pictures float32 [B,3,height,width] in [0,1] to [B,...]."""
BATCH = 16
TORCHSCRIPT = (".pt", ".pth", ".ts")


def inception_features(model: Path, pictures: Iterable[Picture]) -> F32:
    """[N,D] of pictures of any sizes, by a file of ONNX or TorchScript.

    It takes float32 [B,3,height,width] in [0,1] and resizes by itself, as pytorch-fid's InceptionV3 does,
    whose last block before the classifier FID means.
    Raises RequestError if the file is no such model, or there is no picture.
    """
    features = _open_onnx(model) if model.suffix == ".onnx" else _open_torchscript(model)
    made = []
    for batch in _batches(pictures):
        values = np.stack(batch).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
        try:
            found = features(values)
        except Exception as error:  # whatever the library raises
            raise RequestError(f"{model} cannot be run on pictures {values.shape}: {error}") from error
        made.append(np.asarray(found, np.float32).reshape(len(batch), -1))
    if not made:
        raise RequestError("there is no picture to look at")
    return np.concatenate(made)


def _batches(pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
    """Neighbours of one size together."""
    batch: list[Picture] = []
    for picture in pictures:
        if batch and (picture.shape != batch[0].shape or len(batch) == BATCH):
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch


def _open_onnx(model: Path) -> Features:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RequestError(f"{model} is no ONNX model: {error}") from error
    name = session.get_inputs()[0].name
    return lambda values: session.run(None, {name: values})[0]


def _open_torchscript(model: Path) -> Features:
    if model.suffix not in TORCHSCRIPT:
        raise RequestError(
            f"{model}: give an ONNX file (.onnx) or a TorchScript one ({', '.join(TORCHSCRIPT)})"
        )
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the form that Inception's weights come in
            module: Any = torch.jit.load(model, map_location="cpu")  # type: ignore[no-untyped-call]
        module.eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise RequestError(f"{model} is no TorchScript model: {error}") from error

    def features(values: F32) -> F32:
        with torch.inference_mode():
            made: Any = module(torch.from_numpy(values))
        return np.asarray(made[0] if isinstance(made, (tuple, list)) else made)

    return features


def clip_embeddings(
    folder: Path, files: Sequence[Path], texts: Sequence[str], read: Callable[[Path], Picture]
) -> tuple[F32, F32]:
    """Of pairs, each [N,D], by a CLIP in a folder of transformers (MLPerf takes OpenAI's ViT-B/32).

    Raises RequestError if the folder holds none, or the pairs are none.
    """
    import torch
    from transformers import CLIPModel, CLIPProcessor

    if len(files) != len(texts) or not files:
        raise RequestError(f"{len(files)} pictures and {len(texts)} captions are no pairs")
    try:
        model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder} holds no CLIP of transformers: {error}") from error
    found: tuple[list[F32], list[F32]] = ([], [])
    for start in range(0, len(texts), BATCH):
        part = slice(start, start + BATCH)
        inputs = processor(
            text=list(texts[part]),
            images=[read(file) for file in files[part]],
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            made = model(**inputs)
        found[0].append(made.image_embeds.float().numpy())
        found[1].append(made.text_embeds.float().numpy())
    return np.concatenate(found[0]), np.concatenate(found[1])
