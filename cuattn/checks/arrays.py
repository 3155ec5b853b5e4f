"""Arrays of queries, keys and values: dtype, device, library, shape, memory."""

from typing import NamedTuple

from cuattn import config
from cuattn.interop import Tensor, contiguous_strides, import_tensor, share_memory
from cuattn.problem import PACKED

#: Lengths and head counts are 32-bit in the kernels, with room for a tile behind the end.
LARGEST_DIM = 2**31 - 2**12
ALIGNMENT = 16
LARGEST_SPAN = 2**31 * ALIGNMENT
#: Axes of a layout in the letters of the documentation.
LETTERS = {"bhsd": "B, H, L, D", "bshd": "B, L, H, D", PACKED: "T, H, D"}
PAGED_LETTERS = {"bhsd": "pages, H, page size, D", "bshd": "pages, page size, H, D"}


class Named(NamedTuple):
    """The array whose dtype, device and library others must have, and the argument that it came from."""

    name: str
    tensor: Tensor


def import_array(name: str, array: object, letters: str, first: Named | None = None) -> Tensor:
    """An array of one of attention's dtypes, ``first``'s if given, with as many dimensions as ``letters`` names."""
    tensor = import_tensor(array, name)
    if tensor.dtype not in config.DTYPES:
        expected = f"{', '.join(config.DTYPES[:-1])} or {config.DTYPES[-1]}"
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {expected}")
    if first is not None:
        if tensor.dtype != first.tensor.dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {first.name}'s {first.tensor.dtype}")
        check_place(name, tensor, first)
    check_rank(name, tensor.shape, letters)
    return tensor


def check_rank(name: str, shape: tuple[int, ...], letters: str) -> None:
    rank = letters.count(",") + 1
    if len(shape) != rank:
        raise ValueError(f"{name}: got shape {shape}, expected {rank} dimensions ({letters})")


def check_place(name: str, tensor: Tensor, first: Named) -> None:
    """On the device of ``first``, and of its library."""
    if tensor.device != first.tensor.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected {first.name}'s {first.tensor.device}")
    if tensor.framework is not first.tensor.framework:
        raise TypeError(f"{name}: got a {tensor.framework.name} array, expected an array of {first.name}'s library")


def check_contiguous(name: str, tensor: Tensor) -> None:
    expected = contiguous_strides(tensor.shape)
    axes = zip(tensor.shape, tensor.strides, expected, strict=True)
    if 0 not in tensor.shape and any(size > 1 and stride != wanted for size, stride, wanted in axes):
        raise ValueError(f"{name}: got strides {tensor.strides}, expected {expected} (contiguous)")


def check_sizes(name: str, tensor: Tensor) -> None:
    """A head dim, which is the last dimension, that kernels exist for, and no dimension beyond 32 bits."""
    if tensor.shape[-1] not in config.HEAD_DIMS:
        expected = f"a multiple of 8 from 8 to {config.HEAD_DIMS[-1]}"
        raise ValueError(f"{name}: got head dim {tensor.shape[-1]}, expected {expected}")
    if max(tensor.shape) > LARGEST_DIM:
        raise ValueError(f"{name}: got shape {tensor.shape}, expected dimensions of at most {LARGEST_DIM}")


def check_keys(key: Named, value: Named) -> None:
    """Keys and values, in kernel axes, of one batch (or set of pages), one length and the same heads."""
    for name, tensor in (key, value):
        check_sizes(name, tensor)
    if value.tensor.shape[:3] != key.tensor.shape[:3]:
        raise ValueError(
            f"{value.name}: got (batch, heads, length) {value.tensor.shape[:3]}, "
            f"expected {key.name}'s {key.tensor.shape[:3]}"
        )


def check_query(query: Tensor, key: Named, value: Named) -> None:
    """A query, in kernel axes, for those keys and values."""
    check_sizes("q", query)
    if key.tensor.shape[3] != query.shape[3]:
        raise ValueError(f"{key.name}: got head dim {key.tensor.shape[3]}, expected q's {query.shape[3]}")
    heads, key_heads = query.shape[1], key.tensor.shape[1]
    if heads % key_heads if key_heads else heads:
        raise ValueError(
            f"q: got {heads} heads, expected a multiple of the {key_heads} heads of {key.name} and {value.name}"
        )


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


def check_span(name: str, tensor: Tensor, axes: tuple[int, ...]) -> None:
    """Places that are looked up are 32-bit numbers of ALIGNMENT bytes: how far keys lie apart along ``axes``."""
    span = sum((tensor.shape[axis] - 1) * abs(tensor.strides[axis]) for axis in axes) * tensor.itemsize
    if span >= LARGEST_SPAN:
        raise ValueError(f"{name}: got keys up to {span} bytes apart, expected less than {LARGEST_SPAN} (32 GiB)")


def check_written(name: str, tensor: Tensor, others: dict[str, Tensor]) -> None:
    """What is written to: allowed, by autograd too, memory of its own for every element, and none of ``others``."""
    if tensor.requires_grad:
        raise ValueError(f"{name}: got a tensor that requires grad, expected one that does not, or torch.no_grad()")
    if tensor.readonly:
        raise ValueError(f"{name}: got read-only memory, expected memory to write to")
    check_memory(name, tensor)
    if 0 in tensor.shape:
        return
    reach = 0  # of the axes with smaller strides, in elements
    for stride, size in sorted((abs(stride), size) for size, stride in zip(tensor.shape, tensor.strides, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"{name}: got strides {tensor.strides}, expected memory of its own for every element")
        reach += (size - 1) * stride
    first, end = tensor.address_range
    for other, source in others.items():
        lowest, highest = source.address_range  # mostly elsewhere, which is quick to see
        if lowest < end and first < highest and share_memory(tensor, source):
            raise ValueError(f"{name}: got the memory of {other}, expected memory of its own")
