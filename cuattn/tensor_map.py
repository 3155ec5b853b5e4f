"""Descriptions of tensors for the copy engine of Hopper GPUs, which copies boxes of them to shared memory and back."""

import ctypes
import functools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cuattn.interop import Tensor

#: Bytes of an encoded map, and what its address is a multiple of.
BYTES = 128
ALIGNMENT = 64
#: Columns of a box: rows of 128 bytes, in which the hardware can swap 16-byte pieces ("swizzle").
BOX_COLUMNS = 64
SWIZZLE_BYTES = 128
LARGEST_BOX = 256
#: What the emulator knows its own form by.
MAGIC = 0x63756174746E6D70

#: CUtensorMapDataType in cuda.h, and the other constants of a map there.
_DATA_TYPES = {"float16": 6, "bfloat16": 9}
_INTERLEAVE_NONE, _SWIZZLE_128B, _L2_PROMOTION_128B, _OUT_OF_BOUNDS_ZERO = 0, 3, 2, 0
_ITEMSIZE = 2
_UNIT = 16
_LARGEST_EXTENT = 2**32
_STRIDE_LIMIT = 2**40

#: Bytes of a map in the form that whoever runs the kernel reads.
Encode = Callable[["TensorMap"], bytes]


@dataclass(frozen=True)
class TensorMap:
    """Boxes of a 4-d tensor of 16-bit elements, axes innermost first: column, token, head, batch.

    A box has 64 columns and ``rows`` tokens of ``heads`` heads of one batch entry; what lies outside of the tensor is
    zero, and not written. A head's rows lie one behind the other, with the swizzle of 128 bytes.

    dims: the tensor's extents; strides: in bytes, of all axes but the first.
    """

    pointer: int
    dtype: str
    dims: tuple[int, int, int, int]
    strides: tuple[int, int, int]
    rows: int
    heads: int = 1

    @classmethod
    def of(cls, tensor: Tensor, rows: int, heads: int = 1) -> "TensorMap":
        """Of a tensor (batch, head, token, column) for which `can_map` holds; ValueError for another one."""
        if not can_map(tensor):
            raise ValueError(f"tensor: got one that no tensor map can describe: {tensor}")
        for name, extent in (("rows", rows), ("heads", heads)):
            if not 1 <= extent <= LARGEST_BOX:
                raise ValueError(f"{name}: got {extent}, expected 1 to {LARGEST_BOX}")
        batch, head, token, column = tensor.shape
        # along an axis of one element nothing moves, but the driver wants a distance that could be one
        row = -(-column * _ITEMSIZE // _UNIT) * _UNIT
        batch_stride, head_stride, token_stride = (
            stride * _ITEMSIZE if extent > 1 else row
            for extent, stride in zip(tensor.shape[:3], tensor.strides[:3], strict=True)
        )
        strides = (token_stride, head_stride, batch_stride)
        return cls(tensor.pointer, tensor.dtype, (column, token, head, batch), strides, rows, heads)

    def at(self, pointer: int) -> "TensorMap":
        """The map of a tensor of the same form that lies elsewhere, at a multiple of 16 bytes."""
        return replace(self, pointer=pointer)

    @property
    def box(self) -> tuple[int, int, int, int]:
        return (BOX_COLUMNS, self.rows, self.heads, 1)


def can_map(tensor: Tensor) -> bool:
    """Whether a tensor can be described: what the driver asks of an address, extents and strides."""
    if tensor.dtype not in _DATA_TYPES or len(tensor.shape) != 4 or tensor.pointer % _UNIT:
        return False
    if not all(1 <= extent <= _LARGEST_EXTENT for extent in tensor.shape):
        return False
    if tensor.shape[3] > 1 and tensor.strides[3] != 1:
        return False
    steps = (
        stride * _ITEMSIZE for extent, stride in zip(tensor.shape[:3], tensor.strides[:3], strict=True) if extent > 1
    )
    return all(0 < step < _STRIDE_LIMIT and step % _UNIT == 0 for step in steps)


def argument(params: ctypes.Structure, maps: Mapping[str, TensorMap], encode: Encode) -> bytearray:
    """The bytes of a kernel's argument; ``maps`` go to the fields of their names, TensorMapBytes in params.py."""
    filled = bytearray(params)
    for name, tensor_map in maps.items():
        place = getattr(type(params), name).offset
        filled[place : place + BYTES] = encode(tensor_map)
    return filled


def encode_emulated(tensor_map: TensorMap) -> bytes:
    """The form that the emulator's copy engine reads: words of 64 bits.

    Magic number, address, bytes of an element, rank, four extents, three strides in bytes, four extents of the box,
    bytes of the swizzle.
    """
    shape = (_ITEMSIZE, len(tensor_map.dims), *tensor_map.dims, *tensor_map.strides, *tensor_map.box)
    return struct.pack("=16Q", MAGIC, tensor_map.pointer, *shape, SWIZZLE_BYTES)


@functools.lru_cache(maxsize=4096)
def encode(tensor_map: TensorMap) -> bytes:
    """The driver's form. Raises RuntimeError where the driver refuses, or knows no such maps (before CUDA 12)."""
    room = ctypes.create_string_buffer(BYTES + ALIGNMENT)
    start = -ctypes.addressof(room) % ALIGNMENT
    rank = len(tensor_map.dims)
    code = _encode_tiled()(
        ctypes.addressof(room) + start,
        _DATA_TYPES[tensor_map.dtype],
        rank,
        tensor_map.pointer,
        (ctypes.c_uint64 * rank)(*tensor_map.dims),
        (ctypes.c_uint64 * (rank - 1))(*tensor_map.strides),
        (ctypes.c_uint32 * rank)(*tensor_map.box),
        (ctypes.c_uint32 * rank)(*(1,) * rank),
        _INTERLEAVE_NONE,
        _SWIZZLE_128B,
        _L2_PROMOTION_128B,
        _OUT_OF_BOUNDS_ZERO,
    )
    if code:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled failed with CUDA error {code}: {tensor_map}, box {tensor_map.box}, "
            f"swizzle of {SWIZZLE_BYTES} bytes"
        )
    return room.raw[start : start + BYTES]


@functools.cache
def _encode_tiled() -> Any:
    """cuTensorMapEncodeTiled of the driver, which is there wherever a GPU is."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"tensor maps need a CUDA driver of version 12 or newer: {error}") from error
    function.argtypes = (
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p),
        *(ctypes.POINTER(ctypes.c_uint64),) * 2,
        *(ctypes.POINTER(ctypes.c_uint32),) * 2,
        *(ctypes.c_int,) * 4,
    )
    return function
