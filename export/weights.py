"""Weights that stay on disk: read when they are used, and written as a stream.

A safetensors file is a length (8 bytes), a JSON header with dtype, shape and place of every tensor, and data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from allaprima.bundle import ExportError
from allaprima.export.reason import reason

DTYPES = {
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes of safetensors that a checkpoint of this exporter may hold."""
Weights = dict[str, torch.Tensor]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are."""

    file: Path
    start: int
    length: int


class StoredTensor(torch.Tensor):
    """A tensor whose values are read from its file by every operation on it, and kept by none.

    What only passes it on, cuts it without a gap, or rounds it once to another floating dtype gives a stored
    tensor again: a model of them takes no memory, whatever its size. The file must stay as it is meanwhile.
    """

    place: Place
    stored: torch.dtype

    @staticmethod
    def __new__(
        cls, place: Place, shape: Iterable[int], stored: torch.dtype, dtype: torch.dtype | None = None
    ) -> StoredTensor:
        made: StoredTensor = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype or stored)
        made.place, made.stored = place, stored
        return made

    def __init__(self, *_: object) -> None:
        super().__init__()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"StoredTensor({self.place}, {tuple(self.shape)}, {self.dtype})"

    def read(self) -> torch.Tensor:
        """The values, in memory of their own. OSError if the file cannot be read or is too short."""
        values = torch.empty(self.shape, dtype=self.stored)
        if self.place.length:
            memory = _memory(values)
            with self.place.file.open("rb", buffering=0) as file:
                file.seek(self.place.start)
                done = 0
                while done < len(memory):
                    count = file.readinto(memory[done:])
                    if not count:
                        raise OSError(f"{self.place.file} ends too early")
                    done += count
        return values.to(self.dtype)

    def cast(self, dtype: torch.dtype) -> torch.Tensor:
        """The same in another dtype, still on disk where that is one rounding."""
        if self.dtype == self.stored:
            return StoredTensor(self.place, self.shape, self.stored, dtype)
        return self.read().to(dtype)

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StoredTensor | None:
        """What an operation that copies nothing makes, where its bytes follow one another in the file."""
        made = func(torch.empty(self.shape, dtype=self.dtype, device="meta"), *args, **kwargs)
        if not (isinstance(made, torch.Tensor) and made.is_contiguous()):
            return None
        if made.dtype != self.dtype or made.is_neg():  # the same bytes, other values
            return None
        size = self.stored.itemsize
        start = self.place.start + int(made.storage_offset()) * size
        return StoredTensor(
            Place(self.place.file, start, made.numel() * size), made.shape, self.stored, self.dtype
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        first = args[0] if args else None
        if isinstance(first, StoredTensor):
            if func.is_view and (seen := first._view(func, args[1:], kwargs or {})) is not None:
                return seen
            if func is aten._to_copy.default:
                dtype = (kwargs or {}).get("dtype") or first.dtype
                if first.dtype.is_floating_point and dtype.is_floating_point:
                    return first.cast(dtype)
        args, kwargs = torch.utils._pytree.tree_map_only(
            StoredTensor, StoredTensor.read, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def address(tensor: torch.Tensor) -> object:
    """What tensors of the same values in the same memory or place have in common."""
    return tensor.place if isinstance(tensor, StoredTensor) else tensor.data_ptr()


def read_header(file: Path) -> dict[str, tuple[Place, tuple[int, ...], torch.dtype]]:
    """Every tensor of a safetensors file by name: place, shape and dtype.

    Raises:
        ExportError: the file cannot be read, or is damaged.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"its header cannot be {length} bytes long")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        return {name: _entry(file, 8 + length, size, name, entry) for name, entry in header.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as cause:
        raise ExportError(f"'{file}' cannot be read as safetensors: {reason(cause)}") from cause


def _entry(
    file: Path, start: int, size: int, name: str, entry: Mapping[str, Any]
) -> tuple[Place, tuple[int, ...], torch.dtype]:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is of dtype {entry['dtype']}, which this exporter does not know")
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(extent) for extent in entry["shape"])
    first, last = entry["data_offsets"]
    if last - first != torch.Size(shape).numel() * dtype.itemsize or not 0 <= first <= last <= size - start:
        raise ValueError(f"the data of {name} is not all there")
    return Place(file, start + first, last - first), shape, dtype


def open_weights(files: Iterable[Path]) -> Weights:
    """The tensors of these safetensors files by name, on disk. Raises ExportError as `read_header`."""
    return {
        name: StoredTensor(place, shape, dtype)
        for file in files
        for name, (place, shape, dtype) in read_header(file).items()
    }


def write_weights(
    tensors: Mapping[str, torch.Tensor], path: Path, values: Callable[[str], torch.Tensor] | None = None
) -> dict[str, Place]:
    """Write a safetensors file one tensor after the other, and say where each is.

    The file is, byte for byte, the one that `safetensors.torch.save_file` would write from memory.

    Args:
        tensors: what to write by name; with `values` only shapes and dtypes count.
        path: the file.
        values: makes the tensor of a name when it is its turn.

    Raises:
        OSError: a tensor cannot be read, or the file not be written.
    """
    # The library's own order, which depends on dtypes and names alone.
    empty = save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()})
    names = list(json.loads(empty[8 : 8 + int.from_bytes(empty[:8], "little")]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = tensors[name].dtype, tensors[name].shape
        first, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            value = values(name) if values is not None else tensors[name]
            value = value.read() if isinstance(value, StoredTensor) else value.detach()
            file.write(_memory(value.contiguous()))
    start = 8 + len(text)
    places = ((name, header[name]["data_offsets"]) for name in names)
    return {name: Place(path, start + first, last - first) for name, (first, last) in places}


def _memory(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
