"""The kernel for many rows in 16 bits on Hopper GPUs."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from cuattn import contract
from cuattn.config.base import ARCHITECTURES, Constants, KernelConfig, dims_name, tile_columns

ARCH = "sm_90a"
DTYPES = ("float16", "bfloat16")
#: Columns that one wgmma instruction of kernels_cu/ptx/wgmma.cuh gives.
VALUE_COLUMNS = (64, 96, 128, 192, 256)
#: A register file, in registers; a thread's are allocated in units.
REGISTERS = 65536
REGISTER_UNIT = 8
#: Larger head dims leave no registers to spare for finding out which rows come next.
LARGEST_OF_FEW_ROWS = 128
#: Rows of which decode_sm90 computes a multiple, and its warps that multiply values.
ROW_BLOCK, VALUE_WARPS = 8, 4
#: Room in which its warps tell each other what comes first.
START_BYTES = 40 * 4 * 32
#: What a consumer's thread needs besides outputs, scores, weights and queries, found by trying; the most it can have.
OTHER_REGISTERS, MOST_REGISTERS = 40, 255
#: Rows of a warp, of which the copy engine can store a box.
WARP_ROWS = 16
#: More slots than this do not hide more latency; with fewer, two warpgroups half a step apart leave none to be filled.
MOST_SLOTS, FEWEST_SLOTS = 8, 4


@dataclass(frozen=True)
class ForwardSm90Config(KernelConfig):
    """Attention of many rows through wgmma: each consumer warpgroup has 64 packed rows of a key head.

    Where keys lie a fixed distance apart the copy engine fetches them, else (paged) threads do. With ``split`` (then
    ragged, too) blocks share the chunks of rows; with ``few`` as well, a block has any range of the chunks of any rows.
    With ``out_boxes`` (where `may_store_boxes`) finished rows leave through shared memory by the copy engine.
    """

    kernel = "forward_sm90"
    params = "ForwardSm90Params"

    head_dim: int
    value_dim: int
    mask: str
    dtype: str
    arch: str
    ragged: bool = False
    paged: bool = False
    split: bool = False
    few: bool = False
    out_boxes: bool = False

    blocks_per_multiprocessor = 1
    overlaps = True

    @functools.cached_property
    def name(self) -> str:
        shared = "_few" if self.few else "_split" if self.split else ""
        kind = shared + ("_paged" if self.paged else "_ragged" if self.ragged else "")
        kind += "_boxes" * self.out_boxes
        return f"{self.kernel}_{dims_name(self.head_dim, self.value_dim)}_{self.mask}{kind}_{self.dtype}_{self.arch}"

    @property
    def constants(self) -> Constants:
        return {
            "head_dim": self.head_dim,
            "tile_dim": tile_columns(self.head_dim),
            "value_dim": self.value_dim,
            "value_tile_dim": tile_columns(self.value_dim),
            "value_columns": self.value_columns,
            "causal": self.mask == "causal",
            "bfloat16": self.dtype == "bfloat16",
            "ragged": self.ragged,
            "paged": self.paged,
            "packed": self.ragged,
            "partial_results": False,
            "split": self.split,
            "few": self.few,
            "key_tile": self.key_tile,
            "held_queries": self.held_queries,
            "consumers": self.consumers,
            "ring_slots": self.ring_slots,
            "merged_in_shared": self.merged_in_shared,
            "out_boxes": self.out_boxes,
            "warp_rows": WARP_ROWS,
            "producer_registers": self.producer_registers,
            "consumer_registers": self.consumer_registers,
        }

    @property
    def key_tile(self) -> int:
        return contract.key_tile(max(self.head_dim, self.value_dim))

    @property
    def value_columns(self) -> int:
        """Columns of the product with values: the fewest that an instruction has."""
        return next(columns for columns in VALUE_COLUMNS if columns >= self.value_dim)

    @property
    def threads(self) -> int:
        return 128 * (1 + self.consumers)

    @property
    def row_tile(self) -> int:
        """Packed rows of a block."""
        return 64 * self.consumers

    @property
    def consumers(self) -> int:
        return self._shape[0]

    @property
    def merged_in_shared(self) -> bool:
        """Whether shared memory holds the outputs of finished chunks; else a workspace does."""
        return self._shape[1]

    @property
    def may_store_boxes(self) -> bool:
        """Whether finished rows leave as boxes where they make some: of one length, with room in shared memory."""
        return self.merged_in_shared and not self.ragged

    @property
    def ring_slots(self) -> int:
        return self._shape[2]

    @property
    def producer_registers(self) -> int:
        if self.consumers == 3:
            return 32
        return 56 if self.paged else 40

    @property
    def consumer_registers(self) -> int:
        """What the producer leaves of the registers that the block starts with."""
        start = REGISTERS // self.threads // REGISTER_UNIT * REGISTER_UNIT
        left = start * (1 + self.consumers) - self.producer_registers
        return left // self.consumers // REGISTER_UNIT * REGISTER_UNIT

    @property
    def held_queries(self) -> int:
        """Groups of 16 columns of a warpgroup's queries that stay in registers, 4 of a thread for each."""
        if self.paged or self.head_dim < self.value_dim:
            return 0  # the places of keys take the registers, or outputs do, beside which queries are little to read
        # outputs, scores and packed weights
        products = self.value_columns // 2 + self.key_tile // 2 + self.key_tile // 4
        free = min(self.consumer_registers, MOST_REGISTERS) - products - OTHER_REGISTERS
        return max(0, min(free // 4, -(-self.head_dim // 16)))

    @property
    def merged_floats(self) -> int:
        """Of a block's workspace for finished chunks."""
        return 0 if self.merged_in_shared else self.row_tile * self.value_columns

    @functools.cached_property
    def shared_bytes(self) -> int:
        consumers, merged, slots = self._shape
        return self._bytes(consumers, merged, slots)

    def _bytes(self, consumers: int, merged_in_shared: bool, slots: int) -> int:
        """Queries, the ring, finished chunks and barriers."""
        columns = tile_columns(self.head_dim), tile_columns(self.value_dim)
        rows = (64 * consumers * columns[0] + slots * self.key_tile * max(columns)) * 2
        merged = 64 * consumers * (self.value_columns * merged_in_shared + 2) * 4
        barriers = 2 * slots + 1 + 2 * consumers
        return -(-(rows + merged + 8 * barriers) // 1024) * 1024

    @functools.cached_property
    def _shape(self) -> tuple[int, bool, int]:
        """(consumer warpgroups, whether finished chunks are in shared memory, slots): the first that fits."""
        for consumers, merged in self._candidates():
            for slots in range(MOST_SLOTS, FEWEST_SLOTS - 1, -1):
                if self._bytes(consumers, merged, slots) <= ARCHITECTURES[self.arch]:
                    return consumers, merged, slots
        raise AssertionError(f"{self}: no shape fits into memory")  # every head dim fits: tested

    def _candidates(self) -> Iterator[tuple[int, bool]]:
        """Best first."""
        if self.few:
            yield 1, True
        if max(self.head_dim, self.value_dim) <= 64:
            yield 3, True
        yield 2, True
        yield 2, False


@dataclass(frozen=True)
class DecodeConfig(KernelConfig):
    """Attention of a few rows, in blocks of 8 for a key head: a block of threads has any range of their chunks.

    The copy engine fetches keys, which lie a fixed distance apart or in pages; lengths are read on the device.
    """

    kernel = "decode_sm90"
    params = "ForwardSm90Params"

    head_dim: int
    value_dim: int
    mask: str
    dtype: str
    arch: str
    row_blocks: int
    paged: bool = False

    blocks_per_multiprocessor = 1
    overlaps = True
    merged_floats = 0

    @functools.cached_property
    def name(self) -> str:
        dims = dims_name(self.head_dim, self.value_dim)
        kind = f"rows{self.row_tile}" + "_paged" * self.paged
        return f"{self.kernel}_{dims}_{self.mask}_{kind}_{self.dtype}_{self.arch}"

    @property
    def constants(self) -> Constants:
        return {
            "head_dim": self.head_dim,
            "tile_dim": tile_columns(self.head_dim),
            "value_dim": self.value_dim,
            "value_tile_dim": tile_columns(self.value_dim),
            "causal": self.mask == "causal",
            "bfloat16": self.dtype == "bfloat16",
            "ragged": True,
            "paged": self.paged,
            "packed": False,
            "partial_results": False,
            "split": True,
            "few": True,
            "key_tile": self.key_tile,
            "row_blocks": self.row_blocks,
            "score_warps": self._score_warps,
            "value_warps": VALUE_WARPS,
            "start_bytes": START_BYTES,
            "ring_slots": self.ring_slots,
        }

    @property
    def key_tile(self) -> int:
        return contract.key_tile(max(self.head_dim, self.value_dim))

    @property
    def _score_warps(self) -> int:
        """Those that make weights, of 16 keys each, or of 32 where more warps leave too few registers for 16 rows."""
        return 8 if self.key_tile == 128 and self.row_blocks == 1 else 4

    @property
    def threads(self) -> int:
        return 32 * (2 + self._score_warps + VALUE_WARPS)

    @property
    def row_tile(self) -> int:
        return ROW_BLOCK * self.row_blocks

    @property
    def ring_slots(self) -> int:
        return min(2 * MOST_SLOTS, (ARCHITECTURES[self.arch] - self._fixed_bytes) // self._slot_bytes)

    @property
    def shared_bytes(self) -> int:
        return self.ring_slots * self._slot_bytes + self._fixed_bytes

    @property
    def _slot_bytes(self) -> int:
        return self.key_tile * tile_columns(max(self.head_dim, self.value_dim)) * 2

    @property
    def _fixed_bytes(self) -> int:
        """Of two tiles scores, weights in both forms and two numbers for each row; and barriers."""
        row = 2 * (8 * (self.key_tile + 4) + 2 * (self.key_tile + 8) + 4 * 2) + 4
        return -(-(self.row_tile * row + START_BYTES + 8 * (4 * MOST_SLOTS + 5)) // 1024) * 1024
