"""The constants of the numerical contract (docs/numerics.md): what decides bits, and nothing that sees a batch.

Every function here takes absolute key positions, a head dimension or a scale. None can see a batch size, another
sequence's length, a split count or a device.
"""

import math
from collections.abc import Iterator

import numpy as np

#: Version of docs/numerics.md that this package implements. It changes whenever any output bit may change.
CONTRACT_VERSION = 1

#: (first absolute key index, chunk length): a chunk at key j is as long as the last row with first <= j says.
CHUNK_TABLE = ((0, 512), (2048, 1024), (16384, 2048), (65536, 4096))

LOG2_E = math.log2(math.e)
_SMALLEST_FACTOR = float(np.finfo(np.float32).tiny)
_LARGEST_FACTOR = float(np.finfo(np.float32).max)


def key_tile(head_dim: int) -> int:
    """Keys per tile: the granularity of the running maximum. It divides every chunk length.

    ``head_dim`` is the larger one where queries and values differ.
    """
    return 128 if head_dim <= 128 else 64


def chunk_length(start: int) -> int:
    """Length in keys of the chunk that starts at the absolute key index ``start``."""
    return next(length for first, length in reversed(CHUNK_TABLE) if start >= first)


def _segments() -> Iterator[tuple[int, int, int]]:
    """(first key index, chunk length, chunks before it) of each row of the table."""
    before, previous = 0, CHUNK_TABLE[0]
    for first, length in CHUNK_TABLE:
        before += (first - previous[0]) // previous[1]
        previous = first, length
        yield first, length, before


def chunk_start(chunk: int) -> int:
    """The absolute index of the first key of a chunk, counted from 0."""
    return next(first + (chunk - before) * length for first, length, before in [*_segments()][::-1] if chunk >= before)


def chunk_count(keys: int) -> int:
    """Chunks that cover the keys 0 to ``keys`` - 1."""
    for first, length, before in [*_segments()][::-1]:
        if keys > first:
            return before - (first - keys) // length
    return 0


def softmax_factor(scale: float) -> tuple[float, bool]:
    """``(c, negate)``: weights are ``2**(c * s - r)``, ``s`` negated first for a negative scale (contract, section 3).

    c is ``|scale| * log2(e)`` rounded once to fp32 and clamped to the normal range, so that ``c * -inf`` is ``-inf``.
    """
    exact = min(abs(scale) * LOG2_E, _LARGEST_FACTOR)
    return max(float(np.float32(exact)), _SMALLEST_FACTOR), scale < 0
