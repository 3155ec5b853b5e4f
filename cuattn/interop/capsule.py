"""The DLPack capsule, read and relabelled in place (https://dmlc.github.io/dlpack/latest/c_api.html)."""

import ctypes
from dataclasses import dataclass
from typing import Any

from cuattn.interop.tensor import contiguous_strides

#: The protocol version asked for. Exporters that know none answer with the unversioned structure.
MAX_VERSION = (1, 0)
#: DLDeviceType: the kinds of memory that a CPU reads, and those that a CUDA kernel reads (device, managed).
CPU_KINDS = (1, 3)
CUDA_KINDS = (2, 13)

_READ_ONLY = 1
_BFLOAT = 4
#: DLDataTypeCode to the first part of NumPy's name; the bits follow.
_CODES = {0: "int", 1: "uint", 2: "float", _BFLOAT: "bfloat", 5: "complex"}
_BOOL = 6


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Unversioned(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


# Prototypes of our own: setting argtypes on ctypes.pythonapi's functions would change them for the whole process.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


@dataclass(frozen=True)
class Content:
    """The fields of a capsule: shape and strides in elements, dtype by name, device as DLPack's (kind, index)."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: tuple[int, int]
    readonly: bool


def _open(capsule: Any) -> tuple[_DLTensor, bool]:
    """The capsule's tensor, valid while the capsule lives, and whether it is read-only; BufferError if unreadable."""
    if _is_valid(capsule, b"dltensor_versioned"):
        managed = _Versioned.from_address(_get_pointer(capsule, b"dltensor_versioned"))
        if managed.major > MAX_VERSION[0]:
            raise BufferError(f"DLPack version {managed.major}.{managed.minor}, expected at most version 1")
        return managed.tensor, bool(managed.flags & _READ_ONLY)
    if _is_valid(capsule, b"dltensor"):
        # The unversioned structure cannot say whether writing is allowed; arrays of JAX, for one, are immutable.
        return _Unversioned.from_address(_get_pointer(capsule, b"dltensor")).tensor, True
    raise BufferError(f"{capsule!r}, expected an unused DLPack capsule")


def _dtype_name(dtype: _DataType) -> str:
    if dtype.lanes == 1 and dtype.code == _BOOL:
        return "bool"
    if dtype.lanes != 1 or dtype.code not in _CODES:
        raise BufferError(f"DLPack dtype (code {dtype.code}, {dtype.bits} bits, {dtype.lanes} lanes) is not supported")
    return f"{_CODES[dtype.code]}{dtype.bits}"


def read(capsule: Any) -> Content:
    """The content of a capsule, which stays unused: while it lives the memory does, and its end calls the deleter.

    BufferError for a dtype or a protocol version that cuattn does not know.
    """
    tensor, readonly = _open(capsule)
    shape = tuple(tensor.shape[: tensor.ndim])
    return Content(
        pointer=(tensor.data or 0) + tensor.byte_offset,
        shape=shape,
        strides=tuple(tensor.strides[: tensor.ndim]) if tensor.strides else contiguous_strides(shape),
        dtype=_dtype_name(tensor.dtype),
        device=(tensor.device.kind, tensor.device.index),
        readonly=readonly,
    )


def relabel_bfloat16(capsule: Any) -> None:
    """Declare the elements of a fresh capsule of 16-bit integers to be bfloat16."""
    tensor, _ = _open(capsule)
    tensor.dtype.code = _BFLOAT


def request(array: Any, stream: int | None, versioned: bool = True) -> Any:
    """A capsule of ``array``, of the versioned kind if that is asked for and the exporter knows it.

    stream: the CUDA stream that the exporter must order its pending work before; None for CPU memory.
    """
    options = {} if stream is None else {"stream": stream}
    if versioned:
        try:
            return array.__dlpack__(**options, max_version=MAX_VERSION)
        except TypeError:  # an exporter older than the argument, such as NumPy before 2.1
            pass
    return array.__dlpack__(**options)
