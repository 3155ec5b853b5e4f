"""The kernel for many rows in 16 bits."""

import functools
from dataclasses import dataclass

from cuattn import contract
from cuattn.config.base import ARCHITECTURES, HOPPER, Constants, KernelConfig, place_bytes, tile_columns

#: What the kernel serves: one head dim for queries, keys and values, up to this one.
LARGEST_HEAD_DIM = 128
DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True)
class ForwardConfig(KernelConfig):
    """Attention of many rows in 16 bits: each warp computes all columns of 16 rows of one head.

    A ragged kernel reads lengths on the device, a paged one also where keys lie; their bits are the same. The tile,
    chunk and k16 order (what decides bits) follow from head_dim alone; rows per block and ring depth (what decides
    speed) from arch too.
    """

    kernel = "forward_sm80"
    params = "ForwardParams"

    head_dim: int
    mask: str
    dtype: str
    arch: str
    ragged: bool = False
    paged: bool = False

    @functools.cached_property
    def name(self) -> str:
        kind = "_paged" if self.paged else "_ragged" if self.ragged else ""
        return f"{self.kernel}_d{self.head_dim}_{self.mask}{kind}_{self.dtype}_{self.arch}"

    @property
    def constants(self) -> Constants:
        return {
            "head_dim": self.head_dim,
            "tile_dim": self.tile_dim,
            "causal": self.mask == "causal",
            "bfloat16": self.dtype == "bfloat16",
            "ragged": self.ragged,
            "paged": self.paged,
            "key_tile": self.key_tile,
            "warps": self.warps,
            "blocks_per_multiprocessor": self.blocks_per_multiprocessor,
            "query_tile": self.query_tile,
            "ring_slots": self.ring_slots,
        }

    @functools.cached_property
    def key_tile(self) -> int:
        return contract.key_tile(self.head_dim)

    @functools.cached_property
    def tile_dim(self) -> int:
        return tile_columns(self.head_dim)

    @functools.cached_property
    def blocks_per_multiprocessor(self) -> int:
        """Blocks that share a multiprocessor's registers: small head dims leave room for several.

        Three take some care of ptxas; it manages for the plainest kernels, and not on every architecture.
        """
        if self.tile_dim > 64:
            return 1
        plain = self.head_dim == self.tile_dim and not self.ragged
        return 3 if plain and self.arch in ("sm_87", *HOPPER) else 2

    @functools.cached_property
    def warps(self) -> int:
        """Warps per block, each with 16 query rows; fewer where blocks share a multiprocessor or memory is small."""
        return 4 if self.blocks_per_multiprocessor > 1 or ARCHITECTURES[self.arch] < 160 * 1024 else 8

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @functools.cached_property
    def query_tile(self) -> int:
        return 16 * self.warps

    @functools.cached_property
    def ring_slots(self) -> int:
        """Key or value tiles in flight: two where blocks overlap each other, else up to four."""
        if self.blocks_per_multiprocessor > 1:
            return 2
        return min(4, (ARCHITECTURES[self.arch] - self._fixed_bytes) // self._tile_bytes)

    @functools.cached_property
    def shared_bytes(self) -> int:
        return self.ring_slots * self._tile_bytes + self._fixed_bytes

    @functools.cached_property
    def _tile_bytes(self) -> int:
        return self.key_tile * self.tile_dim * 2

    @functools.cached_property
    def _fixed_bytes(self) -> int:
        """Of each row, the fp32 output, reference and sum of earlier chunks; of two tiles, where paged keys lie."""
        merged = self.query_tile * (self.tile_dim + 2) * 4
        return -(-merged // 1024) * 1024 + self.paged * place_bytes(2, self.key_tile)
