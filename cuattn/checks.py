"""Validation: what the caller passed becomes a Problem, or an error that names the argument, what it got and expected.

Nothing is allocated or launched here.
"""

import math
import numbers
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cuattn import config
from cuattn.interop import Tensor, host_bits, import_tensor, share_memory
from cuattn.problem import LAYOUTS, PACKED, Problem, Sequences, in_kernel_axes

#: Lengths and head counts are 32-bit in the kernels, with room for a tile behind the end.
LARGEST_DIM = 2**31 - 2**12
ALIGNMENT = 16
#: Axes of a layout in the letters of the documentation.
LETTERS = {"bhsd": "B, H, L, D", "bshd": "B, L, H, D", PACKED: "T, H, D"}


def check_attention(
    q: object,
    k: object,
    v: object,
    mask: str | None,
    scale: object,
    key_padding_mask: object,
    layout: str,
    num_splits: object,
    kv_lengths: object = None,
) -> Problem:
    """Checks the arguments of `cuattn.attention`, all but ``out``."""
    _check_choice("layout", layout, LAYOUTS)
    if key_padding_mask is not None:
        raise NotImplementedError("key_padding_mask: got a mask, expected None in this release")
    problem = _check_arrays(q, k, v, mask, scale, layout, num_splits)
    key, query = problem.key, problem.query
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"k: got batch size {key.shape[0]}, expected q's {query.shape[0]}")
    if kv_lengths is None:
        return problem
    lengths = _check_lengths("kv_lengths", kv_lengths, query)
    if lengths.shape != query.shape[:1]:
        raise ValueError(f"kv_lengths: got shape {lengths.shape}, expected (batch,) {query.shape[:1]}")
    if lengths.device.kind == "cpu":
        values = host_bits(lengths).view(np.int32)
        if ((values < 0) | (values > key.shape[2])).any():
            raise ValueError(f"kv_lengths: got {values.tolist()}, expected numbers from 0 to k's length {key.shape[2]}")
    return replace(problem, sequences=Sequences(query.shape[0], key_lengths=lengths))


def check_varlen(
    q: object,
    k: object,
    v: object,
    cu_seqlens_q: object,
    cu_seqlens_k: object,
    mask: str | None,
    max_seqlen_q: object,
    max_seqlen_k: object,
    scale: object,
    num_splits: object,
) -> Problem:
    """Checks the arguments of `cuattn.attention_varlen`, all but ``out``."""
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        _check_count(name, bound, 0)
    problem = _check_arrays(q, k, v, mask, scale, PACKED, num_splits)
    starts = {}
    for name, array, packed in (
        ("cu_seqlens_q", cu_seqlens_q, problem.query),
        ("cu_seqlens_k", cu_seqlens_k, problem.key),
    ):
        tensor = starts[name] = _check_lengths(name, array, problem.query)
        if tensor.shape[0] == 0:
            raise ValueError(f"{name}: got shape (0,), expected (sequences + 1,)")
        if tensor.device.kind == "cpu":
            _check_cumulative(name, host_bits(tensor).view(np.int32), packed.shape[2])
    query_starts, key_starts = starts["cu_seqlens_q"], starts["cu_seqlens_k"]
    if key_starts.shape != query_starts.shape:
        raise ValueError(f"cu_seqlens_k: got shape {key_starts.shape}, expected cu_seqlens_q's {query_starts.shape}")
    count = query_starts.shape[0] - 1
    if count == 0 and problem.query_length > 0:
        raise ValueError(f"cu_seqlens_q: got no sequence, expected {problem.query_length} tokens in sequences")
    return replace(problem, sequences=Sequences(count, query_starts, key_starts))


def _check_arrays(
    q: object, k: object, v: object, mask: str | None, scale: object, layout: str, num_splits: object
) -> Problem:
    """What all calls have in common."""
    if mask is None:
        mask = "full"
    _check_choice("mask", mask, config.MASKS)
    _check_count("num_splits", num_splits, 1)

    query, key, value = (import_tensor(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    for name, tensor in (("q", query), ("k", key), ("v", value)):
        if tensor.dtype not in config.DTYPES:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {' or '.join(config.DTYPES)}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected q's {query.dtype}")
        _check_same_place(name, tensor, query)
        if len(tensor.shape) != len(layout):
            raise ValueError(f"{name}: got shape {tensor.shape}, expected {len(layout)} dimensions ({LETTERS[layout]})")
    query, key, value = (in_kernel_axes(x, layout) for x in (query, key, value))
    _check_shapes(query, key, value)
    for name, tensor in (("q", query), ("k", key), ("v", value)):
        check_memory(name, tensor)
    return Problem(query, key, value, mask, _check_scale(scale, query.shape[3]), layout)


def _check_same_place(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected q's {query.device}")
    if tensor.framework is not query.framework:
        raise TypeError(f"{name}: got a {tensor.framework.name} array, expected an array of q's library")


def _check_lengths(name: str, array: object, query: Tensor) -> Tensor:
    """An array of int32 lengths beside the query."""
    tensor = import_tensor(array, name)
    if tensor.dtype != "int32":
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected int32")
    _check_same_place(name, tensor, query)
    if len(tensor.shape) != 1:
        raise ValueError(f"{name}: got shape {tensor.shape}, expected 1 dimension")
    if tensor.shape[0] > 1 and tensor.strides[0] != 1:
        raise ValueError(f"{name}: got stride {tensor.strides[0]}, expected 1 (contiguous)")
    return tensor


def _check_cumulative(name: str, starts: npt.NDArray[np.int32], total: int) -> None:
    if starts[0] != 0 or starts[-1] != total or (np.diff(starts) < 0).any():
        raise ValueError(f"{name}: got {starts.tolist()}, expected ascending numbers from 0 to the {total} tokens")


def check_out(out: object, problem: Problem) -> Tensor:
    """The caller's ``out``, in kernel axes."""
    tensor = import_tensor(out, "out")
    query = problem.query
    if tensor.shape != problem.out_shape:
        raise ValueError(f"out: got shape {tensor.shape}, expected {problem.out_shape}")
    if tensor.dtype != query.dtype:
        raise TypeError(f"out: got dtype {tensor.dtype}, expected q's {query.dtype}")
    _check_same_place("out", tensor, query)
    if tensor.requires_grad:
        raise ValueError("out: got a tensor that requires grad, expected one that does not, or torch.no_grad()")
    if tensor.readonly:
        raise ValueError("out: got read-only memory, expected memory to write to")
    tensor = in_kernel_axes(tensor, problem.layout)
    check_memory("out", tensor)
    if 0 in tensor.shape:
        return tensor
    reach = 0  # of the axes with smaller strides, in elements
    for stride, size in sorted((abs(stride), size) for size, stride in zip(tensor.shape, tensor.strides, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"out: got strides {tensor.strides}, expected memory of its own for every element")
        reach += (size - 1) * stride
    for name, source in (("q", query), ("k", problem.key), ("v", problem.value)):
        if share_memory(tensor, source):
            raise ValueError(f"out: got the memory of {name}, expected memory of its own")
    return tensor


def check_memory(name: str, tensor: Tensor) -> None:
    """What a kernel needs of a tensor's memory: a contiguous last dimension, rows at multiples of 16 bytes."""
    if 0 in tensor.shape:
        return
    if tensor.shape[-1] > 1 and tensor.strides[-1] != 1:
        raise ValueError(f"{name}: got stride {tensor.strides[-1]} in the last dimension, expected 1 (contiguous)")
    if tensor.pointer % ALIGNMENT:
        raise ValueError(
            f"{name}: got memory at a multiple of {tensor.pointer & -tensor.pointer} bytes, expected {ALIGNMENT}"
        )
    for axis, size, stride in zip(("batch", "heads", "tokens"), tensor.shape[:-1], tensor.strides[:-1], strict=True):
        if size > 1 and stride * tensor.itemsize % ALIGNMENT:
            raise ValueError(
                f"{name}: got a stride of {stride} elements in the {axis} dimension, expected a multiple of "
                f"{ALIGNMENT // tensor.itemsize} ({ALIGNMENT} bytes)"
            )


def _check_choice(name: str, got: object, choices: tuple[str, ...]) -> None:
    if not isinstance(got, str):
        raise TypeError(f"{name}: got {type(got).__name__}, expected one of {', '.join(map(repr, choices))}")
    if got not in choices:
        raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(map(repr, choices))}")


def _check_count(name: str, got: object, least: int) -> None:
    if got is None:
        return
    expected = f"None or an int of at least {least}"
    if isinstance(got, bool) or not isinstance(got, numbers.Integral):
        raise TypeError(f"{name}: got {type(got).__name__}, expected {expected}")
    if got < least:
        raise ValueError(f"{name}: got {got}, expected {expected}")


def _check_scale(scale: object, head_dim: int) -> float:
    if scale is None:
        return float(head_dim**-0.5)
    # no tensors: reading one would wait for its device
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale: got {type(scale).__name__}, expected None or a finite float")
    try:
        value = float(scale)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"scale: got {value}, expected None or a finite float")
    return value


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.shape[3] not in config.HEAD_DIMS:
        text = f"q: got head dim {query.shape[3]}, expected a multiple of 8 from 8 to {config.HEAD_DIMS[-1]}"
        if query.shape[3] % 8 == 0 and 8 <= query.shape[3] <= 256:
            raise NotImplementedError(text + " in this release")
        raise ValueError(text)
    if key.shape != value.shape:
        raise ValueError(f"v: got (batch, heads, length, head dim) {value.shape}, expected k's {key.shape}")
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"k: got head dim {key.shape[3]}, expected q's {query.shape[3]}")
    query_heads, key_heads = query.shape[1], key.shape[1]
    if query_heads % key_heads if key_heads else query_heads:
        raise ValueError(f"q: got {query_heads} heads, expected a multiple of the {key_heads} heads of k and v")
    for name, tensor in (("q", query), ("k", key)):
        if max(tensor.shape) > LARGEST_DIM:
            raise ValueError(f"{name}: got shape {tensor.shape}, expected dimensions of at most {LARGEST_DIM}")
