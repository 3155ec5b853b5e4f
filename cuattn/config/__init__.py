"""KernelConfig: all that a compiled kernel may depend on. Batch, lengths, device size and splits have no place here."""

import functools
from dataclasses import replace
from itertools import product

from cuattn.config import forward, hopper
from cuattn.config.backward import CompactConfig, KeysConfig, QueriesConfig, RowsConfig
from cuattn.config.base import (
    ARCHITECTURES,
    DTYPES,
    HEAD_DIMS,
    MASKS,
    OWN_ARCHITECTURES,
    KernelConfig,
    architecture_of,
    capability,
)
from cuattn.config.columns import ColumnsConfig
from cuattn.config.forward import ForwardConfig
from cuattn.config.hopper import DecodeConfig, ForwardSm90Config
from cuattn.config.small import AppendConfig, CombineConfig, ScanConfig

__all__ = [
    "ARCHITECTURES",
    "DTYPES",
    "HEAD_DIMS",
    "MASKS",
    "OWN_ARCHITECTURES",
    "AppendConfig",
    "ColumnsConfig",
    "CombineConfig",
    "CompactConfig",
    "DecodeConfig",
    "ForwardConfig",
    "ForwardSm90Config",
    "KernelConfig",
    "KeysConfig",
    "QueriesConfig",
    "RowsConfig",
    "ScanConfig",
    "architecture_of",
    "attention_configs",
    "backward_configs",
    "capability",
    "columns",
    "few_rows",
    "helper_configs",
    "many_rows",
]


#: Numbers of rows of which each may have a kernel of its own; the last is the most that count as few.
FEW_ROWS = (8, 16, 64)


def _is_tiled(head_dim: int, value_dim: int, dtype: str) -> bool:
    """Whether ForwardConfig's kernel serves many rows of these; ColumnsConfig's serves the others, and few rows."""
    return dtype in forward.DTYPES and head_dim == value_dim <= forward.LARGEST_HEAD_DIM


@functools.cache
def many_rows(
    head_dim: int, value_dim: int, mask: str, dtype: str, arch: str, ragged: bool, paged: bool
) -> ForwardSm90Config | ForwardConfig | ColumnsConfig:
    """The kernel for prefill. Its signature is the invariance: nothing of the batch can reach the choice."""
    if arch == hopper.ARCH and dtype in hopper.DTYPES:
        return ForwardSm90Config(head_dim, value_dim, mask, dtype, arch, ragged, paged)
    if _is_tiled(head_dim, value_dim, dtype):
        return ForwardConfig(head_dim, mask, dtype, arch, ragged, paged)
    return columns(head_dim, value_dim, mask, dtype, arch, paged, split=False)


@functools.cache
def few_rows(
    head_dim: int, value_dim: int, mask: str, dtype: str, arch: str, paged: bool, rows: int = 1, boxes: bool = True
) -> DecodeConfig | ForwardSm90Config | ColumnsConfig:
    """The kernel for decode, of up to so many ``rows`` of a sequence and key head.

    ``boxes``: the copy engine can fetch keys and values. Where it cannot, the portable kernel is faster on Hopper, too.
    """
    shape = (head_dim, value_dim, mask, dtype, arch)
    if arch == hopper.ARCH and dtype in hopper.DTYPES and boxes:
        small = max(head_dim, value_dim) <= hopper.LARGEST_OF_FEW_ROWS
        row_blocks = max(1, -(-rows // hopper.ROW_BLOCK))
        if row_blocks <= 1 + small:
            return DecodeConfig(*shape, row_blocks, paged)
        if small and not paged:
            return ForwardSm90Config(*shape, ragged=True, split=True, few=True)
    return columns(*shape, paged, split=True)


@functools.cache
def columns(head_dim: int, value_dim: int, mask: str, dtype: str, arch: str, paged: bool, split: bool) -> ColumnsConfig:
    """The kernel for everything that no other one serves, and for partial results."""
    return ColumnsConfig(head_dim, value_dim, mask, dtype, arch, split, paged)


def attention_configs(
    head_dim: int, mask: str, dtype: str, arch: str, value_dim: int | None = None
) -> list[KernelConfig]:
    """The kernels that attention may need; ``value_dim`` is that of values, None for ``head_dim``."""
    value_dim = value_dim or head_dim
    shape = (head_dim, value_dim, mask, dtype, arch)
    lengths = [(False, False), (True, False), (True, True)]
    many = [many_rows(*shape, ragged, paged) for ragged, paged in lengths]
    hopper_kernels = [kernel for kernel in many if isinstance(kernel, ForwardSm90Config)]
    shared = [replace(kernel, split=True) for kernel in hopper_kernels if kernel.ragged]
    storing = [replace(kernel, out_boxes=True) for kernel in hopper_kernels if kernel.may_store_boxes]
    few = [
        few_rows(*shape, paged, rows, boxes) for paged, rows, boxes in product((False, True), FEW_ROWS, (True, False))
    ]
    partial = columns(*shape, paged=False, split=True)
    return [*dict.fromkeys([*many, *shared, *storing, *few, partial]), CombineConfig(value_dim, dtype, arch)]


def backward_configs(
    head_dim: int, mask: str, dtype: str, arch: str, value_dim: int | None = None
) -> list[KernelConfig]:
    """The kernels that gradients may need, besides those of `helper_configs`."""
    value_dim = value_dim or head_dim
    queries = [QueriesConfig(head_dim, value_dim, dtype, arch, paged) for paged in (False, True)]
    return [RowsConfig(value_dim, mask, dtype, arch), KeysConfig(head_dim, value_dim, dtype, arch), *queries]


def helper_configs(arch: str) -> list[KernelConfig]:
    """The kernels that do not depend on a head dim."""
    return [AppendConfig(arch), ScanConfig(arch), CompactConfig(arch)]
