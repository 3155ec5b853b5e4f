"""Validation: what the caller passed becomes a Problem, or an error that names the argument, what it got and expected.

Nothing is allocated or launched here.
"""

import math
import numbers
from dataclasses import dataclass, replace

from cuattn import config
from cuattn.interop import Tensor, import_tensor, share_memory

LAYOUTS = ("bhsd", "bshd")
#: Lengths and head counts are 32-bit in the kernels, with room for a tile behind the end.
LARGEST_DIM = 2**31 - 2**12
ALIGNMENT = 16


@dataclass(frozen=True)
class Problem:
    """A checked call. All tensors have the axes (batch, head, token, column), whatever the caller's layout."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: str
    scale: float
    layout: str

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def query_heads(self) -> int:
        return self.query.shape[1]

    @property
    def key_heads(self) -> int:
        return self.key.shape[1]

    @property
    def query_length(self) -> int:
        return self.query.shape[2]

    @property
    def key_length(self) -> int:
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output in the caller's layout."""
        return caller_axes(self.query.shape, self.layout)


def caller_axes(sizes: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Sizes or strides of (batch, head, token, column) in the caller's layout, and back (its own inverse)."""
    return sizes if layout == "bhsd" else (sizes[0], sizes[2], sizes[1], sizes[3])


def check_attention(
    q: object,
    k: object,
    v: object,
    mask: str | None,
    scale: object,
    key_padding_mask: object,
    layout: str,
    num_splits: object,
) -> Problem:
    """Checks the arguments of `cuattn.attention`, all but ``out``."""
    _check_choice("layout", layout, LAYOUTS)
    if mask is None:
        mask = "full"
    _check_choice("mask", mask, config.MASKS)
    if key_padding_mask is not None:
        raise NotImplementedError("key_padding_mask: got a mask, expected None in this release")
    if num_splits is not None and (isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 1):
        raise ValueError(f"num_splits: got {num_splits!r}, expected None or a positive int")

    query, key, value = (import_tensor(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    for name, tensor in (("q", query), ("k", key), ("v", value)):
        if tensor.dtype not in config.DTYPES:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {' or '.join(config.DTYPES)}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected q's {query.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected q's {query.device}")
        if tensor.framework is not query.framework:
            raise TypeError(f"{name}: got a {tensor.framework.name} array, expected {query.framework.name} like q")
        if len(tensor.shape) != 4:
            raise ValueError(f"{name}: got shape {tensor.shape}, expected 4 dimensions ({', '.join(layout.upper())})")
    query, key, value = (in_kernel_axes(x, layout) for x in (query, key, value))
    _check_shapes(query, key, value)
    for name, tensor in (("q", query), ("k", key), ("v", value)):
        check_memory(name, tensor)
    return Problem(query, key, value, mask, _check_scale(scale, query.shape[3]), layout)


def check_out(out: object, problem: Problem) -> Tensor:
    """The caller's ``out``, in kernel axes."""
    tensor = import_tensor(out, "out")
    query = problem.query
    expected = (problem.out_shape, query.dtype, query.device, query.framework.name)
    got = (tensor.shape, tensor.dtype, tensor.device, tensor.framework.name)
    for what, mine, wanted in zip(("shape", "dtype", "device", "array library"), got, expected, strict=True):
        if mine != wanted:
            error = TypeError if what in ("dtype", "array library") else ValueError
            raise error(f"out: got {what} {mine}, expected {wanted}")
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
    for size, stride in zip(tensor.shape[:-1], tensor.strides[:-1], strict=True):
        if size > 1 and stride * tensor.itemsize % ALIGNMENT:
            raise ValueError(
                f"{name}: got a stride of {stride} elements, expected a multiple of {ALIGNMENT // tensor.itemsize}"
                f" ({ALIGNMENT} bytes) outside of the last dimension"
            )


def _check_choice(name: str, got: object, choices: tuple[str, ...]) -> None:
    if not isinstance(got, str):
        raise TypeError(f"{name}: got {type(got).__name__}, expected one of {', '.join(map(repr, choices))}")
    if got not in choices:
        raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(map(repr, choices))}")


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
        dims = ", ".join(map(str, config.HEAD_DIMS))
        text = f"q: got head dim {query.shape[3]}, expected one of {dims}"
        if query.shape[3] % 8 == 0 and 8 <= query.shape[3] <= 256:
            raise NotImplementedError(text + " in this release")
        raise ValueError(text)
    if key.shape != value.shape:
        raise ValueError(f"v: got (batch, heads, length, head dim) {value.shape}, expected k's {key.shape}")
    for what, axis in (("batch size", 0), ("head dim", 3)):
        if key.shape[axis] != query.shape[axis]:
            raise ValueError(f"k: got {what} {key.shape[axis]}, expected q's {query.shape[axis]}")
    query_heads, key_heads = query.shape[1], key.shape[1]
    if query_heads % key_heads if key_heads else query_heads:
        raise ValueError(f"q: got {query_heads} heads, expected a multiple of the {key_heads} heads of k and v")
    for name, tensor in (("q", query), ("k", key)):
        if max(tensor.shape) > LARGEST_DIM:
            raise ValueError(f"{name}: got shape {tensor.shape}, expected dimensions of at most {LARGEST_DIM}")


def in_kernel_axes(tensor: Tensor, layout: str) -> Tensor:
    """The same memory with the axes (batch, head, token, column)."""
    return replace(tensor, shape=caller_axes(tensor.shape, layout), strides=caller_axes(tensor.strides, layout))
