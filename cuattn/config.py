"""KernelConfig: all that a compiled kernel may depend on. Batch, lengths, device size and splits have no place here."""

import functools
from dataclasses import dataclass

from cuattn import contract

MASKS = ("full", "causal")
DTYPES = ("float16", "bfloat16")
HEAD_DIMS = tuple(range(8, 129, 8))
#: NVRTC targets, with the shared memory in bytes that one block may use there (CUDA C++ Programming Guide, table of
#: technical specifications per compute capability).
ARCHITECTURES = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_87": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90a": 227 * 1024,
    "sm_100a": 227 * 1024,
    "sm_103a": 227 * 1024,
    "sm_110a": 227 * 1024,
    "sm_120": 99 * 1024,
    "sm_121": 99 * 1024,
}


def architecture_of(compute_capability: str) -> str:
    """Target for a compute capability such as "90": the entry of ARCHITECTURES with that number.

    Raises NotImplementedError for a capability without an entry.
    """
    for arch in ARCHITECTURES:
        if arch.removeprefix("sm_").rstrip("a") == compute_capability:
            return arch
    raise NotImplementedError(
        f"device: got compute capability {compute_capability}, expected one of {', '.join(ARCHITECTURES)}"
    )


@dataclass(frozen=True)
class KernelConfig:
    """One specialisation of a kernel.

    head_dim, mask and dtype are what the caller asked for, arch the compilation target. A ragged kernel reads lengths
    on the device; its bits are those of the other. The tile, chunk and k16 order (what decides bits) follow from
    head_dim alone; rows per block and ring depth (what decides speed) from arch too.
    """

    head_dim: int
    mask: str
    dtype: str
    arch: str
    ragged: bool = False
    kernel: str = "forward_sm80"

    @functools.cached_property
    def name(self) -> str:
        ragged = "_ragged" if self.ragged else ""
        return f"{self.kernel}_d{self.head_dim}_{self.mask}{ragged}_{self.dtype}_{self.arch}"

    @functools.cached_property
    def key_tile(self) -> int:
        return contract.key_tile(self.head_dim)

    @functools.cached_property
    def tile_dim(self) -> int:
        """Columns of a tile in shared memory: head_dim and zeros behind it."""
        return -(-self.head_dim // 64) * 64

    @functools.cached_property
    def blocks_per_multiprocessor(self) -> int:
        """Blocks that share a multiprocessor's registers: small head dims leave room for several.

        Three take some care of ptxas; it manages for the plainest kernels, and not on every architecture.
        """
        if self.tile_dim > 64:
            return 1
        plain = self.head_dim == self.tile_dim and not self.ragged
        return 3 if plain and self.arch.startswith(("sm_8", "sm_9")) else 2

    @functools.cached_property
    def warps(self) -> int:
        """Warps per block, each with 16 query rows; fewer where blocks share a multiprocessor or memory is small."""
        return 4 if self.blocks_per_multiprocessor > 1 or ARCHITECTURES[self.arch] < 160 * 1024 else 8

    @functools.cached_property
    def query_tile(self) -> int:
        return 16 * self.warps

    @functools.cached_property
    def ring_slots(self) -> int:
        """Key or value tiles in flight: two where blocks overlap each other, else up to four."""
        if self.blocks_per_multiprocessor > 1:
            return 2
        return min(4, (ARCHITECTURES[self.arch] - self._merged_bytes) // self._tile_bytes)

    @functools.cached_property
    def shared_bytes(self) -> int:
        return self.ring_slots * self._tile_bytes + -(-self._merged_bytes // 1024) * 1024

    @functools.cached_property
    def _tile_bytes(self) -> int:
        return self.key_tile * self.tile_dim * 2

    @functools.cached_property
    def _merged_bytes(self) -> int:
        """Of each row, the fp32 output, reference and sum of earlier chunks."""
        return self.query_tile * (self.tile_dim + 2) * 4


@functools.cache
def select_config(head_dim: int, mask: str, dtype: str, arch: str, ragged: bool = False) -> KernelConfig:
    """The kernel for a problem. Its signature is the invariance: nothing of the batch can reach the choice."""
    return KernelConfig(head_dim, mask, dtype, arch, ragged)


def all_configs(arch: str) -> list[KernelConfig]:
    return [select_config(d, m, t, arch, r) for d in HEAD_DIMS for m in MASKS for t in DTYPES for r in (False, True)]
