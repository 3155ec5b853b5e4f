"""The kernel for few rows, and for every dtype and head dim."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from cuattn import contract
from cuattn.config.base import ARCHITECTURES, Constants, KernelConfig, dims_name, itemsize, place_bytes, tile_columns

#: Slots of a ring: more than this do not hide more latency.
MOST_SLOTS = 6


@dataclass(frozen=True)
class ColumnsConfig(KernelConfig):
    """Attention whose scores pass through shared memory: 16 rows belong to several warps, which share the columns.

    It serves every dtype and head dim. With ``split`` blocks have few rows and take any range of a row's chunks, else
    each block has all chunks of its rows. Keys may lie anywhere, and the lengths are read on the device, in either.
    """

    kernel = "forward_columns"
    params = "SplitParams"

    head_dim: int
    value_dim: int
    mask: str
    dtype: str
    arch: str
    split: bool
    paged: bool = False

    @functools.cached_property
    def name(self) -> str:
        kind = "_split" * self.split + "_paged" * self.paged
        return f"{self.kernel}_{dims_name(self.head_dim, self.value_dim)}_{self.mask}{kind}_{self.dtype}_{self.arch}"

    @property
    def constants(self) -> Constants:
        return {
            "head_dim": self.head_dim,
            "tile_dim": self.tile_dim,
            "value_dim": self.value_dim,
            "value_tile_dim": self.value_tile_dim,
            "causal": self.mask == "causal",
            "float32": self.dtype == "float32",
            "bfloat16": self.dtype == "bfloat16",
            "split": self.split,
            "ragged": True,
            "paged": self.paged,
            "packed": True,
            "partial_results": self.split,
            "place_tiles": self._place_tiles(self.slot_keys),
            "key_tile": self.key_tile,
            "row_warps": self.row_warps,
            "column_warps": self.column_warps,
            "slot_keys": self.slot_keys,
            "ring_slots": self.ring_slots,
            "blocks_per_multiprocessor": self.blocks_per_multiprocessor,
            "query_in_registers": self._query_in_registers,
        }

    @property
    def _query_in_registers(self) -> bool:
        """Where ptxas has registers for it besides the outputs."""
        if self.dtype == "float32":
            return False
        if self.column_warps > 2 or self.tile_dim <= 128:
            return True
        return not self.arch.startswith("sm_1") and (self.tile_dim <= 192 or self.row_warps > 2)

    @property
    def key_tile(self) -> int:
        return contract.key_tile(max(self.head_dim, self.value_dim))

    @property
    def tile_dim(self) -> int:
        return tile_columns(self.head_dim)

    @property
    def value_tile_dim(self) -> int:
        return tile_columns(self.value_dim)

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.column_warps

    @property
    def row_tile(self) -> int:
        """Rows of a block: of all query heads that share a key head, a token's heads behind each other."""
        return 16 * self.row_warps

    @property
    def row_warps(self) -> int:
        return self._shape[0]

    @property
    def column_warps(self) -> int:
        return self._shape[1]

    @property
    def slot_keys(self) -> int:
        """Keys or values in one slot of the ring: a tile or a part of it."""
        return self._shape[2]

    @property
    def blocks_per_multiprocessor(self) -> int:
        return self._shape[3]

    @property
    def ring_slots(self) -> int:
        return self._shape[4]

    @functools.cached_property
    def shared_bytes(self) -> int:
        rows, columns, keys, _, slots = self._shape
        return self._fixed_bytes(rows, columns, keys) + slots * self._slot_bytes(keys)

    @functools.cached_property
    def _shape(self) -> tuple[int, int, int, int, int]:
        """(row warps, column warps, keys a slot, blocks a multiprocessor, slots): the first that fits."""
        memory = ARCHITECTURES[self.arch]
        for rows, columns, keys, blocks in self._candidates():
            room = memory // blocks - 1024 * (blocks - 1) - self._fixed_bytes(rows, columns, keys)
            slots = min(MOST_SLOTS, room // self._slot_bytes(keys))
            if slots >= 2:
                return rows, columns, keys, blocks, slots
        raise AssertionError(f"{self}: no shape fits into {memory} bytes")  # every head dim fits everywhere: tested

    def _candidates(self) -> Iterator[tuple[int, int, int, int]]:
        """Best first: as many rows and blocks as fit, then keys enough for each warp to compute scores of some."""
        float32 = self.dtype == "float32"
        warps = [(1, 8 if float32 and self.value_tile_dim == 256 else 4)]
        if not self.split:
            warps = [(2, 4), (1, 4)] if float32 else [(4, 2), (2, 2)]
        most = min(32 if float32 else 64, self.key_tile) if self.split else self.key_tile
        for (rows, columns), blocks in product(warps, (2, 1) if self.split and warps[0][1] == 4 else (1,)):
            least = min(most, 16 * columns)
            yield from ((rows, columns, most >> i, blocks) for i in range(4) if most >> i >= least)
        yield (*warps[-1], 16, 1)

    def _slot_bytes(self, keys: int) -> int:
        return keys * max(self.tile_dim, self.value_tile_dim) * itemsize(self.dtype)

    def _fixed_bytes(self, row_warps: int, column_warps: int, slot_keys: int) -> int:
        """Queries, scores of a tile, merged chunks, and places of paged keys in as many tiles as slots may span."""
        rows = 16 * row_warps
        merged = self.value_tile_dim // 8 * 512 + column_warps * 128
        total = rows * self.tile_dim * itemsize(self.dtype) + rows * (self.key_tile + 8) * 4 + row_warps * merged
        places = place_bytes(self._place_tiles(slot_keys), self.key_tile)
        return -(-total // 1024) * 1024 + self.paged * places

    def _place_tiles(self, slot_keys: int) -> int:
        """Tiles that slots may span, and the one behind them."""
        return max(2, (MOST_SLOTS - 1) // (2 * self.key_tile // slot_keys) + 1)
