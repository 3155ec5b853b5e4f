"""The argument of a forward kernel: the mirror of kernels_cu/attn/params.cuh, field by field."""

import ctypes


class Strides(ctypes.Structure):
    """Distances in elements."""

    _fields_ = [("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("token", ctypes.c_int64)]


class SequenceArrays(ctypes.Structure):
    """Arrays of int32 on the device that hold lengths, or null."""

    _fields_ = [
        ("query_starts", ctypes.c_void_p),
        ("key_starts", ctypes.c_void_p),
        ("key_lengths", ctypes.c_void_p),
        ("count", ctypes.c_int),
    ]


class ForwardParams(ctypes.Structure):
    """Pointers, strides and sizes of one launch; shapes stand in params.cuh."""

    _fields_ = [
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("query_strides", Strides),
        ("key_strides", Strides),
        ("value_strides", Strides),
        ("out_strides", Strides),
        ("sequences", SequenceArrays),
        ("query_heads", ctypes.c_int),
        ("group", ctypes.c_int),
        ("query_length", ctypes.c_int),
        ("key_length", ctypes.c_int),
        ("query_tiles", ctypes.c_int),
        ("factor", ctypes.c_float),
        ("negate_scores", ctypes.c_int),
    ]
