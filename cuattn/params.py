"""The arguments of the kernels: the mirror of kernels_cu/attn/params.cuh, field by field."""

import ctypes
from collections.abc import Sequence
from typing import Any

from cuattn import tensor_map

_POINTER, _INT, _LONG, _WORD, _FLOAT = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_uint32,
    ctypes.c_float,
)


class TensorMapBytes(ctypes.Structure):
    """Room for a tensor map, which whoever launches fills in from `Launch.tensor_maps`."""

    _fields_ = [("words", ctypes.c_uint64 * (tensor_map.BYTES // 8))]


def mapped(fields: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The fields of a struct that has tensor maps, which stand first: with the padding that C++ adds at its end.

    There a map's address, and so the struct's size, is a multiple of 64, which ctypes knows nothing of.
    """

    class Unpadded(ctypes.Structure):
        _fields_ = fields

    padding = -ctypes.sizeof(Unpadded) % tensor_map.ALIGNMENT
    return [*fields, ("padding", ctypes.c_char * padding)] if padding else [*fields]


class Strides(ctypes.Structure):
    """Distances in elements; ``page`` between the pages of paged keys."""

    _fields_ = [("batch", _LONG), ("head", _LONG), ("token", _LONG), ("page", _LONG)]


class SequenceArrays(ctypes.Structure):
    """Lengths and places that only the device knows; every pointer may be null."""

    _fields_ = [
        ("query_starts", _POINTER),
        ("key_starts", _POINTER),
        ("key_lengths", _POINTER),
        ("pages", _POINTER),
        ("seen", _POINTER),
        ("count", _INT),
        ("cached", _INT),
        ("new_keys", _INT),
        ("pages_per_sequence", _INT),
        ("page_count", _INT),
        ("page_size", _INT),
        ("page_magic", _WORD),
        ("page_shift", _WORD),
        ("few_rows", _INT),
    ]


class ForwardParams(ctypes.Structure):
    _fields_ = [
        ("query", _POINTER),
        ("key", _POINTER),
        ("value", _POINTER),
        ("out", _POINTER),
        ("lse", _POINTER),
        ("query_strides", Strides),
        ("key_strides", Strides),
        ("value_strides", Strides),
        ("out_strides", Strides),
        ("sequences", SequenceArrays),
        ("query_heads", _INT),
        ("group", _INT),
        ("query_length", _INT),
        ("key_length", _INT),
        ("query_tiles", _INT),
        ("factor", _FLOAT),
        ("negate_scores", _INT),
    ]


class PartialParams(ctypes.Structure):
    """Where the results of single chunks lie."""

    _fields_ = [
        ("out", _POINTER),
        ("reference", _POINTER),
        ("sum", _POINTER),
        ("groups", _POINTER),
        ("chunks", _INT),
        ("rows", _INT),
        ("first_chunk", _INT),
        ("end_chunk", _INT),
        ("by_group", _INT),
    ]


class SplitParams(ctypes.Structure):
    _fields_ = [("forward", ForwardParams), ("partials", PartialParams)]


class ForwardSm90Params(ctypes.Structure):
    _fields_ = mapped(
        [
            ("key_map", TensorMapBytes),
            ("value_map", TensorMapBytes),
            ("out_map", TensorMapBytes),
            ("call", SplitParams),
            ("merged", _POINTER),
            ("mapped", _INT),
            ("box_rows", _INT),
            ("pieces", _INT),
            ("items", _INT),
            ("group_shift", _INT),
        ]
    )


class CombineParams(ctypes.Structure):
    _fields_ = [
        ("forward", ForwardParams),
        ("partials", PartialParams),
        ("carried", PartialParams),
        ("load_carried", _INT),
        ("store_carried", _INT),
    ]


class BackwardParams(ctypes.Structure):
    _fields_ = [
        ("forward", ForwardParams),
        ("dout", _POINTER),
        ("dlse", _POINTER),
        ("dquery", _POINTER),
        ("dkey", _POINTER),
        ("dvalue", _POINTER),
        ("dout_strides", Strides),
        ("dquery_strides", Strides),
        ("dkey_strides", Strides),
        ("dvalue_strides", Strides),
        ("rows", _POINTER),
        ("contributing", _POINTER),
        ("counts", _POINTER),
        ("row_count", _LONG),
        ("key_heads", _INT),
        ("key_tiles", _INT),
        ("scale", _FLOAT),
    ]


class AppendParams(ctypes.Structure):
    _fields_ = [
        ("new_key", _POINTER),
        ("new_value", _POINTER),
        ("key", _POINTER),
        ("value", _POINTER),
        ("new_key_strides", Strides),
        ("new_value_strides", Strides),
        ("key_strides", Strides),
        ("value_strides", Strides),
        ("sequences", SequenceArrays),
        ("heads", _INT),
        ("new_length", _INT),
        ("key_length", _INT),
        ("key_bytes", _INT),
        ("value_bytes", _INT),
    ]


class ScanParams(ctypes.Structure):
    _fields_ = [
        ("mask", _POINTER),
        ("positions", _POINTER),
        ("seen", _POINTER),
        ("batch_stride", _LONG),
        ("token_stride", _LONG),
        ("key_length", _INT),
    ]
