"""The generated translation unit: the named constants of one KernelConfig and one include."""

from cuattn import contract
from cuattn.config import KernelConfig


def kernel_source(config: KernelConfig) -> str:
    """CUDA C++ of one specialisation: ``namespace cuattn::config`` and the include of ``{config.kernel}.cuh``.

    The kernel is an ``extern "C" __global__`` function of that name with one struct argument by value. The device
    compiler and the emulator's host compiler compile this same text. It is a function of the configuration and the
    contract alone, so nothing about the problem's other sizes can reach a kernel through it.
    """
    constants: dict[str, int | bool] = {
        "contract_version": contract.CONTRACT_VERSION,
        "head_dim": config.head_dim,
        "tile_dim": config.tile_dim,
        "causal": config.mask == "causal",
        "bfloat16": config.dtype == "bfloat16",
        "ragged": config.ragged,
        "key_tile": config.key_tile,
        "warps": config.warps,
        "blocks_per_multiprocessor": config.blocks_per_multiprocessor,
        "query_tile": config.query_tile,
        "ring_slots": config.ring_slots,
        "shared_bytes": config.shared_bytes,
    }
    lines = [
        f"// {config.name}, contract version {contract.CONTRACT_VERSION}",
        "namespace cuattn::config {",
        *(f"constexpr {type(value).__name__} {name} = {str(value).lower()};" for name, value in constants.items()),
        "// Keys in the chunk that starts at the absolute key index `start`.",
        "__device__ constexpr int chunk_length(int start) {",
        f"    return {_chunk_expression()};",
        "}",
        "}  // namespace cuattn::config",
        f"#include <{config.kernel}.cuh>",
    ]
    return "\n".join(lines) + "\n"


def _chunk_expression() -> str:
    (_, shortest), *longer = contract.CHUNK_TABLE
    return "".join(f"start >= {first} ? {length} : " for first, length in reversed(longer)) + str(shortest)
