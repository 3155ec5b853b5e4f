"""The generated translation unit: the named constants of one KernelConfig and one include."""

from cuattn import contract
from cuattn.config import KernelConfig


def kernel_source(config: KernelConfig) -> str:
    """CUDA C++ of one specialisation: ``namespace cuattn::config`` and the include of ``{config.kernel}.cuh``.

    The kernel is an ``extern "C" __global__`` function of that name with one struct argument by value. The device
    compiler and the emulator's host compiler compile this same text. It is a function of the configuration and the
    contract alone, so nothing about the problem's other sizes can reach a kernel through it.
    """
    constants = {
        "contract_version": contract.CONTRACT_VERSION,
        **config.constants,
        "shared_bytes": config.shared_bytes,
    }
    rows = [(first, length, contract.chunk_count(first)) for first, length in reversed(contract.CHUNK_TABLE)]
    length_of = [(f"start >= {first}", str(length)) for first, length, _ in rows]
    start_of = [(f"chunk >= {before}", f"{first} + (chunk - {before}) * {length}") for first, length, before in rows]
    count_of = [
        (f"keys > {first}", f"{before} + (keys - {first} + {length - 1}) / {length}") for first, length, before in rows
    ]
    lines = [
        f"// {config.name}, contract version {contract.CONTRACT_VERSION}",
        "namespace cuattn::config {",
        *(f"constexpr {type(value).__name__} {name} = {str(value).lower()};" for name, value in constants.items()),
        *_function(
            "Keys in the chunk that starts at the absolute key index `start`.", "chunk_length(int start)", length_of
        ),
        *_function("The absolute index of the first key of a chunk.", "chunk_start(int chunk)", start_of),
        *_function("Chunks that cover the keys before `keys`.", "chunk_count(int keys)", count_of),
        "}  // namespace cuattn::config",
        f"#include <{config.kernel}.cuh>",
    ]
    return "\n".join(lines) + "\n"


def _function(comment: str, signature: str, ladder: list[tuple[str, str]]) -> list[str]:
    """A function that returns the first value whose condition holds; the last condition is not asked."""
    *conditions, (_, last) = ladder
    value = "".join(f"{condition} ? {result} : " for condition, result in conditions) + last
    return [f"// {comment}", f"__device__ constexpr int {signature} {{", f"    return {value};", "}"]
