"""The kernels of the backward pass: of each row what is known of it, and the gradients of keys and of queries."""

import functools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from cuattn.config.base import (
    ARCHITECTURES,
    HOPPER,
    Constants,
    KernelConfig,
    dims_name,
    itemsize,
    place_bytes,
    tile_columns,
)
from cuattn.config.small import HelperConfig

#: Bytes of a RowRecord in kernels_cu/attn/params.cuh.
RECORD_BYTES = 16


@dataclass(frozen=True)
class RowsConfig(KernelConfig):
    """The record of each row. The one kernel that knows the mask."""

    kernel = "backward_rows"
    params = "BackwardParams"
    threads = 256
    shared_bytes = 0

    value_dim: int
    mask: str
    dtype: str
    arch: str

    @property
    def name(self) -> str:
        return f"{self.kernel}_d{self.value_dim}_{self.mask}_{self.dtype}_{self.arch}"

    @property
    def constants(self) -> Constants:
        return {
            "value_dim": self.value_dim,
            "causal": self.mask == "causal",
            "float32": self.dtype == "float32",
            "bfloat16": self.dtype == "bfloat16",
            "threads": self.threads,
            "block_rows": self.block_rows,
        }

    @property
    def block_rows(self) -> int:
        """Rows of a block: a lane has eight columns."""
        lanes: int = 1 << (self.value_dim // 8 - 1).bit_length()
        return self.threads // lanes


class CompactConfig(HelperConfig):
    """The records of the rows that contribute, one behind the other."""

    kernel = "compact_rows"
    params = "BackwardParams"
    threads = 256
    shared_bytes = 1024


@dataclass(frozen=True)
class _GradientConfig(KernelConfig):
    """What the two kernels of gradients share: head dims, and a shape that is the first one that fits into memory."""

    params = "BackwardParams"

    head_dim: int
    value_dim: int
    dtype: str
    arch: str

    @property
    def name(self) -> str:
        return f"{self.kernel}_{dims_name(self.head_dim, self.value_dim)}_{self.dtype}_{self.arch}"

    @property
    def constants(self) -> Constants:
        return {
            "head_dim": self.head_dim,
            "tile_dim": tile_columns(self.head_dim),
            "value_dim": self.value_dim,
            "value_tile_dim": tile_columns(self.value_dim),
            "float32": self.dtype == "float32",
            "bfloat16": self.dtype == "bfloat16",
            "blocks_per_multiprocessor": self.blocks_per_multiprocessor,
        }

    @property
    @abstractmethod
    def blocks_per_multiprocessor(self) -> int: ...

    @property
    def _largest_dim(self) -> int:
        return max(self.head_dim, self.value_dim)

    def _row_bytes(self, rows: int) -> int:
        """So many rows of a query or key, and of what belongs to it among outputs or values."""
        return rows * (tile_columns(self.head_dim) + tile_columns(self.value_dim)) * itemsize(self.dtype)

    def _fits(self, shared_bytes: int, blocks: int) -> bool:
        return blocks * (shared_bytes + 1024) <= ARCHITECTURES[self.arch] + 1024


@dataclass(frozen=True)
class KeysConfig(_GradientConfig):
    """Gradients of keys and values: a block has some keys, and passes over rows."""

    kernel = "backward_keys"

    @property
    def constants(self) -> Constants:
        key_warps, key_blocks, column_warps, row_step, row_part, _ = self._shape
        return {
            **super().constants,
            "key_warps": key_warps,
            "key_blocks": key_blocks,
            "column_warps": column_warps,
            "row_step": row_step,
            "row_part": row_part,
        }

    @property
    def threads(self) -> int:
        key_warps, _, column_warps, *_ = self._shape
        return 32 * key_warps * column_warps

    @property
    def key_tile(self) -> int:
        """Keys of a block."""
        return 16 * self._shape[0] * self._shape[1]

    @property
    def blocks_per_multiprocessor(self) -> int:
        return self._shape[5]

    @functools.cached_property
    def shared_bytes(self) -> int:
        return self._bytes(*self._shape[:5])

    def _bytes(self, key_warps: int, key_blocks: int, column_warps: int, row_step: int, row_part: int) -> int:
        """Keys and values, two steps' rows, three steps' records; twice the scores that warps pass on."""
        total = self._row_bytes(16 * key_warps * key_blocks + 2 * row_step) + 3 * row_step * RECORD_BYTES
        passed_on = column_warps > 1 and row_part >= 16 * column_warps
        scores = 2 * key_warps * 2 * key_blocks * row_part // 8 * 512
        return -(-total // 1024) * 1024 + passed_on * scores

    @functools.cached_property
    def _shape(self) -> tuple[int, int, int, int, int, int]:
        """(key warps, blocks of 16 keys a warp, column warps, rows a copy, rows a step, blocks a multiprocessor)."""
        for shape in self._candidates():
            if self._fits(self._bytes(*shape[:5]), shape[5]):
                return shape
        raise AssertionError(f"{self}: no shape fits into memory")  # every head dim fits everywhere: tested

    def _candidates(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Best first. The accumulators of a warp's keys take half of its registers or less."""
        if self.dtype == "float32":
            if self._largest_dim <= 64:
                yield from ((warps, 1, 1, step, 16, 1) for warps, step in ((8, 32), (4, 32), (4, 16)))
            if self._largest_dim <= 192:
                yield from ((4, 1, 2, 32, 16, 1), (4, 1, 2, 16, 16, 1), (2, 1, 2, 16, 16, 1))
            columns = 2 if self._largest_dim <= 192 else 4
            yield from ((warps, 1, columns, 16, 16, 1) for warps in (8 // columns, 2, 1))
        elif self._largest_dim <= 64:
            if self.arch not in ("sm_80", "sm_87"):  # where ptxas spills
                yield from ((4, 2, 1, 64, 32, 2), (4, 2, 1, 64, 32, 1))
            yield from ((4, 1, 1, 64, 64, 2), (4, 1, 1, 32, 32, 1))
        elif self._largest_dim <= 128:
            if self.arch in HOPPER:  # elsewhere ptxas spills
                yield (8, 1, 1, 64, 64, 1)
            yield from ((8, 1, 1, 64, 32, 1), (8, 1, 1, 32, 32, 1), (4, 1, 1, 32, 32, 1))
        else:
            yield from ((4, 1, 2, 64, 32, 1), (4, 1, 2, 32, 32, 1), (2, 1, 2, 32, 32, 1), (2, 1, 2, 16, 16, 1))


@dataclass(frozen=True)
class QueriesConfig(_GradientConfig):
    """Gradients of queries: a block has some rows, and passes over keys, which a paged kernel finds in tables."""

    kernel = "backward_queries"

    paged: bool = False

    @property
    def name(self) -> str:
        return super().name + "_paged" * self.paged

    @property
    def constants(self) -> Constants:
        row_warps, row_blocks, column_warps, key_step, ring_slots, _ = self._shape
        return {
            **super().constants,
            "paged": self.paged,
            "row_warps": row_warps,
            "row_blocks": row_blocks,
            "column_warps": column_warps,
            "key_step": key_step,
            "ring_slots": ring_slots,
        }

    @property
    def threads(self) -> int:
        return 32 * self._shape[0] * self._shape[2]

    @property
    def query_tile(self) -> int:
        """Rows of a block."""
        return 16 * self._shape[0] * self._shape[1]

    @property
    def blocks_per_multiprocessor(self) -> int:
        return self._shape[5]

    @functools.cached_property
    def shared_bytes(self) -> int:
        return self._bytes(*self._shape[:2], *self._shape[3:5])

    def _bytes(self, row_warps: int, row_blocks: int, key_step: int, ring_slots: int) -> int:
        """The block's rows, the ring of keys and values, and places of two steps' keys."""
        rows = self._row_bytes(16 * row_warps * row_blocks + ring_slots * key_step)
        return -(-rows // 1024) * 1024 + self.paged * place_bytes(2, key_step)

    @functools.cached_property
    def _shape(self) -> tuple[int, int, int, int, int, int]:
        """(row warps, blocks of 16 rows a warp, column warps, keys a step, ring slots, blocks a multiprocessor)."""
        for shape in self._candidates():
            row_warps, row_blocks, _, key_step, ring_slots, blocks = shape
            if self._fits(self._bytes(row_warps, row_blocks, key_step, ring_slots), blocks):
                return shape
        raise AssertionError(f"{self}: no shape fits into memory")  # every head dim fits everywhere: tested

    def _candidates(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Best first."""
        if self.dtype == "float32":
            if self._largest_dim <= 64:
                yield (4, 1, 1, 32, 2, 1)
            columns = 1 if self._largest_dim <= 128 else 2
            yield from ((warps, 1, columns, 16, 2, 1) for warps in (4, 2, 1))
        elif self._largest_dim <= 64:
            yield from ((4, 2, 1, 64, 2, 2), (4, 2, 1, 32, 2, 1))
        elif self._largest_dim <= 128:
            if not self.paged and self.arch in ("sm_80", "sm_87", *HOPPER):  # elsewhere ptxas spills
                yield (4, 2, 1, 32, 2, 2)
                yield (4, 2, 1, 32, 2, 1)
            yield from ((4, 1, 1, 64, 2, 2), (4, 1, 1, 64, 2, 1), (4, 1, 1, 32, 2, 1))
        else:
            yield from ((8, 1, 1, 32, 2, 1), (4, 1, 1, 32, 2, 1), (2, 1, 1, 32, 2, 1), (2, 1, 1, 16, 2, 1))
