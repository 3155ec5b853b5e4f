"""The generated translation unit: the named constants of one KernelConfig and one include."""

import functools

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
    pieces = [(first, length, contract.chunk_count(first)) for first, length in contract.CHUNK_TABLE]
    length_of = [(f"start >= {first}", str(length)) for first, length, _ in reversed(pieces)]
    # lengths grow along the table: of the lines of all pieces the highest one counts, for the inverse the lowest one
    starts = [f"{first} + (chunk - {before}) * {length}" for first, length, before in pieces]
    counts = [
        f"{before} + (keys - {first} + {length - 1} >> {length.bit_length() - 1})" for first, length, before in pieces
    ]
    lines = [
        f"// {config.name}, contract version {contract.CONTRACT_VERSION}",
        "namespace cuattn::config {",
        *(f"constexpr {type(value).__name__} {name} = {str(value).lower()};" for name, value in constants.items()),
        "// Keys in the chunk that starts at the absolute key index `start`.",
        *_function("chunk_length(int start)", _ladder(length_of)),
        "__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }",
        "__device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }",
        "// The absolute index of the first key of a chunk.",
        *_function("chunk_start(int chunk)", functools.reduce(lambda a, b: f"larger({a}, {b})", starts)),
        "// Chunks that cover the keys before `keys`.",
        *_function("chunk_count(int keys)", functools.reduce(lambda a, b: f"smaller({a}, {b})", counts)),
        "}  // namespace cuattn::config",
        f"#include <{config.kernel}.cuh>",
    ]
    return "\n".join(lines) + "\n"


def _ladder(rungs: list[tuple[str, str]]) -> str:
    """The first value whose condition holds; the last condition is not asked."""
    *conditions, (_, last) = rungs
    return "".join(f"{condition} ? {result} : " for condition, result in conditions) + last


def _function(signature: str, value: str) -> list[str]:
    return [f"__device__ constexpr int {signature} {{", f"    return {value};", "}"]
