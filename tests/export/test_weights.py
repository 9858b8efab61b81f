"""Weights on disk: read when they are used, and written as safetensors writes them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allaprima.bundle import ExportError
from allaprima.export.weights import DTYPES, StoredTensor, open_weights, read_header, write_weights

FLOATS = torch.linspace(-3, 3, 24).reshape(2, 3, 4)


def stored(folder: Path, value: torch.Tensor) -> StoredTensor:
    """After another tensor in the same file, so that its place is not the beginning."""
    save_file({"a": torch.ones(5, dtype=value.dtype), "b": value}, folder / "one.safetensors")
    found = open_weights([folder / "one.safetensors"])["b"]
    assert isinstance(found, StoredTensor)
    return found


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4), (24,), (0, 3)], ids=str)
def test_values(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = (FLOATS * 20).abs().to(dtype).reshape(-1)[: torch.Size(shape).numel()].reshape(shape)
    lazy = stored(tmp_path, value)
    assert (lazy.shape, lazy.dtype) == (value.shape, dtype)
    assert torch.equal(lazy.read().double(), value.double())
    assert type(lazy.read()) is torch.Tensor


def test_a_number(tmp_path: Path) -> None:
    assert stored(tmp_path, torch.tensor(2.5)).item() == 2.5


def test_operations_read(tmp_path: Path) -> None:
    lazy = stored(tmp_path, FLOATS)
    for made in (lazy + 0, torch.cat([lazy])[:], lazy.clone(), torch.stack([FLOATS, lazy])[1]):
        assert type(made) is torch.Tensor
        assert torch.equal(made, FLOATS)


def test_what_is_passed_on_stays_on_disk(tmp_path: Path) -> None:
    """A file that is gone shows what was read."""
    lazy = stored(tmp_path, FLOATS)
    parameter = torch.nn.Parameter(lazy, requires_grad=False)
    layer = torch.nn.Linear(4, 3)
    layer.load_state_dict({"weight": lazy[0, :, :], "bias": torch.ones(3)}, assign=True)
    half = lazy.to(torch.float16)
    (tmp_path / "one.safetensors").unlink()
    for one in (parameter, lazy.detach(), lazy[...], lazy.data, half, lazy.bfloat16(), half.detach()):
        assert isinstance(one, StoredTensor)
    with pytest.raises(OSError, match=r"one\.safetensors"):
        half.read()


def test_what_is_cut_without_a_gap_stays_on_disk(tmp_path: Path) -> None:
    lazy = stored(tmp_path, FLOATS)
    for one, wanted in (
        (lazy[1], FLOATS[1]),
        (lazy[1, 1:], FLOATS[1, 1:]),
        (lazy.view(6, 4)[2:5].half(), FLOATS.view(6, 4)[2:5].half()),
        (lazy[..., None].squeeze(-1), FLOATS),
        (lazy[1:1], FLOATS[1:1]),
    ):
        assert isinstance(one, StoredTensor)
        assert (one.shape, one.dtype) == (wanted.shape, wanted.dtype)
        assert torch.equal(one + 0, wanted)
    for one, wanted in (
        (lazy[:, 1], FLOATS[:, 1]),
        (lazy[:, :, ::2], FLOATS[:, :, ::2]),
        (lazy.mT, FLOATS.mT),
    ):
        assert type(one) is torch.Tensor
        assert torch.equal(one, wanted)
    assert torch.equal(lazy.view(torch.int32), FLOATS.view(torch.int32))
    assert torch.equal(torch._neg_view(lazy) + 0, -FLOATS)
    first, second = lazy.split(1)
    assert torch.equal(torch.cat([second, first]), FLOATS.flip(0))


def test_every_rounding_counts(tmp_path: Path) -> None:
    lazy = stored(tmp_path, FLOATS / 7)
    assert torch.equal(lazy.half().read(), (FLOATS / 7).half())
    assert torch.equal(lazy.half().float() + 0, (FLOATS / 7).half().float())
    assert torch.equal(lazy.half().bfloat16() + 0, (FLOATS / 7).half().bfloat16())
    assert torch.equal(lazy.long() + 0, (FLOATS / 7).long())


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    lazy = stored(tmp_path, FLOATS)
    file = tmp_path / "one.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OSError, match="ends too early"):
        lazy.read()


def test_written_as_the_library_does(tmp_path: Path) -> None:
    """Byte for byte: dtypes and names out of order, names beyond ASCII, what is not contiguous, nothing."""
    numbers = {dtype: torch.arange(3, dtype=torch.float32).to(dtype) for dtype in DTYPES.values()}
    tensors = {f"b.{str(dtype)[6:]}": value for dtype, value in numbers.items()}
    tensors |= {
        "é": torch.ones(2, 0),
        'a"b': torch.tensor(1.5),
        "a.10": FLOATS.half(),
        "a.9": FLOATS.half() + 1,
    }
    save_file(tensors, tmp_path / "wanted.safetensors", metadata={"format": "pt"})
    lazy = open_weights([tmp_path / "wanted.safetensors"])
    places = write_weights(lazy, tmp_path / "got.safetensors")
    wanted = (tmp_path / "wanted.safetensors").read_bytes()
    assert (tmp_path / "got.safetensors").read_bytes() == wanted
    write_weights(tensors, tmp_path / "got.safetensors")
    assert (tmp_path / "got.safetensors").read_bytes() == wanted
    for name, place in places.items():
        data = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert wanted[place.start : place.start + place.length] == data
    write_weights({"x": FLOATS.mT}, tmp_path / "got.safetensors")
    assert torch.equal(load_file(tmp_path / "got.safetensors")["x"], FLOATS.mT)


def test_written_as_they_are_made(tmp_path: Path) -> None:
    shapes = {name: torch.empty(3, dtype=torch.float16, device="meta") for name in "bca"}
    asked: list[str] = []

    def make(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.full((3,), float(ord(name)), dtype=torch.float16)

    write_weights(shapes, tmp_path / "made.safetensors", make)
    assert asked == ["a", "b", "c"]
    assert load_file(tmp_path / "made.safetensors")["b"].tolist() == [98.0] * 3


def header(fields: object) -> bytes:
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 8


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN = {
    "empty": b"",
    "no header": b"x" * 50,
    "not JSON": (5).to_bytes(8, "little") + b"{{{{{",
    "a list": header([]),
    "no entry": header({"a": 3}),
    "no offsets": header({"a": {"dtype": "F32", "shape": [2]}}),
    "another dtype": header({"a": {**GOOD, "dtype": "C64", "data_offsets": [0, 16]}}),
    "beyond the end": header({"a": {**GOOD, "data_offsets": [4, 12]}}),
    "backwards": header({"a": {**GOOD, "shape": [], "data_offsets": [-4, 0]}}),
    "of another size": header({"a": {**GOOD, "shape": [3]}}),
    "words for numbers": header({"a": {**GOOD, "data_offsets": ["0", "8"]}}),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "broken.safetensors"
    file.write_bytes(BROKEN[kind])
    with pytest.raises(ExportError, match=r"broken\.safetensors' cannot be read as safetensors: .*\w"):
        read_header(file)


def test_the_good_header_is_good(tmp_path: Path) -> None:
    (tmp_path / "good.safetensors").write_bytes(header({"a": GOOD, "__metadata__": {"format": "pt"}}))
    place, shape, dtype = read_header(tmp_path / "good.safetensors")["a"]
    assert (place.length, shape, dtype) == (8, (2,), torch.float32)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read as safetensors"):
        open_weights([tmp_path / "none.safetensors"])
