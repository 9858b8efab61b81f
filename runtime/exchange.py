"""Arrays on the GPU from and for other libraries, without a copy: torch, CuPy, PyCUDA, Numba, JAX."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from allaprima.bundle import BackendError
from allaprima.runtime.cuda import Gpu
from allaprima.runtime.memory import Tensor

_CUDA = 2
"""kDLCUDA."""
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
"""DLPack's codes of NumPy's kinds."""


def borrow(array: Any) -> Tensor:
    """Somebody else's array on the GPU as a tensor to bind to a session: the same memory, kept while in use.

    Args:
        array: of torch, CuPy, PyCUDA or anything with `__cuda_array_interface__` or DLPack, C-contiguous, in
            the primary context. Work on it that is not on the session's stream must have been waited for.

    Raises:
        BackendError: it is no such array, or not contiguous.
    """
    found = getattr(array, "__cuda_array_interface__", None)
    if isinstance(found, dict):
        shape, dtype, strides = tuple(found["shape"]), np.dtype(found["typestr"]), found.get("strides")
        address = int(found["data"][0])
    elif hasattr(array, "__dlpack__"):
        shape, dtype, strides, address = _view(array)
    else:
        raise BackendError(
            f"{type(array).__name__} has neither __cuda_array_interface__ nor __dlpack__: "
            "hand in an array of the GPU"
        )
    host = np.empty(shape, dtype)  # for its shape and type; nothing is ever written to it
    if strides is not None and _steps(strides, shape) != _steps(host.strides, shape):
        raise BackendError(f"an array with strides {strides}: hand in a C-contiguous one")
    return Tensor(host, address, array)


def _steps(strides: Sequence[int], shape: Sequence[int]) -> list[int]:
    """The strides that matter: nobody steps along an axis of size 1."""
    return [step for step, size in zip(strides, shape, strict=True) if size != 1]


def _view(array: Any) -> tuple[tuple[int, ...], np.dtype[Any], tuple[int, ...] | None, int]:
    """Shape, type, strides in bytes and address of what DLPack gives."""
    if array.__dlpack_device__()[0] != _CUDA:
        raise BackendError(f"{type(array).__name__} is not on the GPU: hand in an array of the GPU")
    from cuda.core.utils import StridedMemoryView

    view: Any = StridedMemoryView.from_dlpack(array, stream_ptr=-1)
    dtype = np.dtype(view.dtype)
    strides = None if view.strides is None else tuple(step * dtype.itemsize for step in view.strides)
    return tuple(view.shape), dtype, strides, int(view.ptr)


@dataclass(frozen=True)
class Lent:
    """A tensor on the GPU for `torch.from_dlpack`, `cupy.asarray` or kernels of PyCUDA, which do not copy it.

    What takes it by `__cuda_array_interface__` waits for its stream; by DLPack it has been waited for.
    """

    tensor: Tensor
    gpu: Gpu

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        array = self.tensor.array
        return {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (self.tensor.address, False),
            "version": 3,
            "stream": self.gpu.stream,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, 0

    def __dlpack__(self, *, stream: int | None = None, **_: object) -> Any:
        if stream != -1:
            self.gpu.synchronize()
        managed = _managed(self.tensor)
        address = ctypes.addressof(managed)
        _LENT[address] = managed, self.tensor
        return _new_capsule(address, b"dltensor", _destroy)


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


_LENT: dict[int, tuple[_DLManagedTensor, Tensor]] = {}
"""What is lent by DLPack, by the address of its description, until it is given back."""


def _give_back(address: int) -> None:
    _LENT.pop(address, None)


def _drop(capsule: int) -> None:
    """Of a capsule that nobody took: one that was taken has another name."""
    if ctypes.pythonapi.PyCapsule_IsValid(ctypes.c_void_p(capsule), b"dltensor"):
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype = ctypes.c_void_p
        _LENT.pop(get(ctypes.c_void_p(capsule), b"dltensor"), None)


_delete, _destroy = _Deleter(_give_back), _Destructor(_drop)


def _new_capsule(address: int, name: bytes, destructor: Any) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, _Destructor)
    return new(address, name, destructor)


def _managed(tensor: Tensor) -> _DLManagedTensor:
    array = tensor.array
    dtype, ndim = array.dtype, array.ndim
    managed = _DLManagedTensor()
    managed.deleter = _delete
    described = managed.tensor
    described.data, described.device_type, described.ndim = tensor.address, _CUDA, ndim
    described.code, described.bits, described.lanes = _CODES[dtype.kind], 8 * dtype.itemsize, 1
    described.shape = (ctypes.c_int64 * ndim)(*array.shape)
    return managed
