"""A plan's launches: the kernel, its argument and the memory that it touches."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

from cuattn.config import KernelConfig
from cuattn.interop import Tensor
from cuattn.params import SequenceArrays, Strides
from cuattn.problem import Sequences
from cuattn.tensor_map import TensorMap

LARGEST_GRID = 2**31 - 1

#: Makes a workspace (shape, dtype) on the problem's device.
Allocate = Callable[[tuple[int, ...], str], Tensor]


@dataclass(frozen=True)
class Target:
    """The device: its architecture and how many multiprocessors it has."""

    arch: str
    processors: int


@dataclass(frozen=True)
class Launch:
    """One launch and the memory that it touches.

    inputs are read; outputs are written, by all launches of a call together completely and each element once; updates
    are caches, read and written in part; scratch is written and read by launches of this call. tensor_maps describe
    some of these tensors: they go to the fields of ``params`` of the same names, in the form that the device knows.
    cluster: blocks that run together; more than one only of a kernel that overlaps.
    """

    config: KernelConfig
    grid: int
    params: ctypes.Structure
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)
    updates: dict[str, Tensor] = field(default_factory=dict)
    scratch: dict[str, Tensor] = field(default_factory=dict)
    tensor_maps: dict[str, TensorMap] = field(default_factory=dict)
    cluster: int = 1

    @property
    def threads(self) -> int:
        return self.config.threads

    @property
    def shared_bytes(self) -> int:
        return self.config.shared_bytes


def sequence_arrays(sequences: Sequences, key: Tensor) -> SequenceArrays:
    def pointer(tensor: Tensor | None) -> int | None:
        return tensor.pointer if tensor else None

    arrays = SequenceArrays(
        query_starts=pointer(sequences.query_starts),
        key_starts=pointer(sequences.key_starts),
        key_lengths=pointer(sequences.key_lengths),
        pages=pointer(sequences.block_table),
        count=sequences.count,
        cached=sequences.cached,
        new_keys=sequences.new_keys,
    )
    if sequences.block_table:
        set_pages(arrays, key.shape[2], sequences.block_table.shape[1], key.shape[0])
    return arrays


def set_pages(arrays: SequenceArrays, page_size: int, pages_per_sequence: int, page_count: int) -> None:
    """The shape of a block table, and the division by the page size as a multiplication.

    For j < 2**31, ``j // d == (2 * j * m) >> 32 >> s`` with ``s = ceil(log2(d))`` and ``m = ceil(2**(31 + s) / d)``
    (Granlund and Montgomery, "Division by invariant integers using multiplication", theorem 4.2).
    """
    arrays.page_size, arrays.pages_per_sequence, arrays.page_count = page_size, pages_per_sequence, page_count
    arrays.page_shift = (page_size - 1).bit_length()
    arrays.page_magic = -(-(2 ** (31 + arrays.page_shift)) // page_size)


def strides_of(tensor: Tensor, paged: bool = False, by_position: bool = False, unit: int = 1) -> Strides:
    """by_position: tables say where each single key of a batch entry lies. ``unit`` is 1 for elements."""
    first, head, token = (stride * unit for stride in tensor.strides[:3])
    return Strides(0 if paged else first, head, token, first if paged else token if by_position else 0)
