"""The canonical chunked order on the CPU, in plain fp32: what the kernels do (docs/numerics.md), readable.

Batch-invariant bit for bit like the kernels, but with bits of its own: products are IEEE operations here, not those of
a tensor core.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cuattn import contract
from cuattn.interop import Tensor, host_bits
from cuattn.problem import PACKED, Problem
from cuattn.reference import arithmetic
from cuattn.reference.arithmetic import Array, exp2

#: Rows computed together, as many as keep a tile of scores in a core's cache. Rows do not see each other.
ROWS = 64
_NO_REFERENCE = np.float32(np.finfo(np.float32).min)


@dataclass
class _Partial:
    """An unnormalised result over some keys: reference (rows,), sum (rows,), out (rows, head_dim)."""

    reference: Array
    sum: Array
    out: Array

    @classmethod
    def empty(cls, rows: int, head_dim: int) -> "_Partial":
        return cls(np.full(rows, _NO_REFERENCE), np.zeros(rows, np.float32), np.zeros((rows, head_dim), np.float32))


@dataclass(frozen=True)
class _Sequence:
    """One sequence: its batch entry, rows and keys; a causal row i sees ``diagonal`` + i + 1 keys, if they exist."""

    batch: int
    queries: slice
    keys: slice
    diagonal: int


def forward(problem: Problem, out: Tensor, lse: Tensor) -> None:
    """Fills ``out`` (batch, head, token, column) and ``lse`` (batch, head, token) of a problem on the CPU."""
    dtype = problem.query.dtype
    query, key, value, out_bits = (host_bits(x) for x in (problem.query, problem.key, problem.value, out))
    lse_values = host_bits(lse).view(np.float32).reshape(problem.query.shape[:3])
    group = problem.query_heads // problem.key_heads

    def one_head(work: tuple[_Sequence, int]) -> None:
        sequence, h = work
        b = sequence.batch
        keys, values = (arithmetic.widen(x[b, h // group, sequence.keys], dtype) for x in (key, value))
        for first in range(sequence.queries.start, sequence.queries.stop, ROWS):
            rows = slice(first, min(first + ROWS, sequence.queries.stop))
            queries = arithmetic.widen(query[b, h, rows], dtype)
            before = sequence.diagonal + first - sequence.queries.start
            with np.errstate(all="ignore"):  # per thread; infinities and NaN take their IEEE course
                result, lse_values[b, h, rows] = _rows(problem, before, queries, keys, values)
                out_bits[b, h, rows] = arithmetic.narrow(result, dtype)

    work = [(sequence, h) for sequence in _sequences(problem) for h in range(problem.query_heads)]
    with ThreadPoolExecutor(min(len(work), os.cpu_count() or 1)) as pool:
        list(pool.map(one_head, work))


def _sequences(problem: Problem) -> Iterator[_Sequence]:
    all_queries, all_keys = slice(0, problem.query_length), slice(0, problem.key_length)
    arrays = problem.sequences.arrays if problem.sequences else {}
    lengths = {name: host_bits(tensor).view(np.int32).tolist() for name, tensor in arrays.items()}
    for s in range(problem.sequences.count if problem.sequences else problem.batch):
        queries, keys = all_queries, all_keys
        if "cu_seqlens_q" in lengths:
            queries, keys = (slice(*lengths[name][s : s + 2]) for name in ("cu_seqlens_q", "cu_seqlens_k"))
        diagonal = (keys.stop - keys.start) - (queries.stop - queries.start)
        if "kv_lengths" in lengths:
            keys = slice(keys.start, keys.start + lengths["kv_lengths"][s])
        yield _Sequence(0 if problem.layout == PACKED else s, queries, keys, diagonal)


def _rows(problem: Problem, before: int, query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """Output before its rounding and LSE of some rows of a head; the first, if causal, sees ``before`` + 1 keys."""
    factor, negate = contract.softmax_factor(problem.scale)
    tile = contract.key_tile(problem.head_dim)
    # the contract's one idea of a mask: row i sees the first visible[i] keys
    visible = np.full(len(query), len(key))
    if problem.mask == "causal":
        visible = np.clip(before + 1 + np.arange(len(query)), 0, len(key))
    if negate:
        query = -query
    merged = _Partial.empty(len(query), problem.head_dim)
    chunk_start = 0
    while chunk_start < visible[-1]:
        chunk_end = chunk_start + contract.chunk_length(chunk_start)
        chunk = _Partial.empty(len(query), problem.head_dim)
        for first in range(chunk_start, min(chunk_end, int(visible[-1])), tile):
            keys, values = _padded(key[first : first + tile], tile), _padded(value[first : first + tile], tile)
            _add_tile(chunk, query, keys, values, visible - first, np.float32(factor), problem.query.dtype)
        merged = _merge(merged, chunk)
        chunk_start = chunk_end
    empty = (merged.sum == 0) & (merged.reference == _NO_REFERENCE)
    scale = np.where(empty, np.float32(0), np.float32(1) / merged.sum)
    lse = merged.reference * arithmetic.LN2 + arithmetic.natural_log(merged.sum)
    # adding +0 turns -0 into +0
    return merged.out * scale[:, None] + np.float32(0), lse


def _add_tile(
    chunk: _Partial, query: Array, key: Array, value: Array, visible: np.ndarray, factor: np.float32, dtype: str
) -> None:
    """Online softmax over one tile of keys, of which row i sees the first visible[i]."""
    score = arithmetic.matmul(query, key.T)
    score[np.arange(len(key)) >= visible[:, None]] = -np.inf
    reference = np.maximum(chunk.reference, score.max(axis=1) * factor)
    rescale = exp2(chunk.reference - reference)
    weight = exp2(score * factor - reference[:, None])
    chunk.reference = reference
    chunk.sum = chunk.sum * rescale + arithmetic.row_sum(weight)
    rounded = arithmetic.widen(arithmetic.narrow(weight, dtype), dtype)
    chunk.out = chunk.out * rescale[:, None] + arithmetic.matmul(rounded, value)


def _merge(merged: _Partial, chunk: _Partial) -> _Partial:
    """The left fold over chunks."""
    reference = np.maximum(merged.reference, chunk.reference)
    a, b = exp2(merged.reference - reference), exp2(chunk.reference - reference)
    return _Partial(reference, chunk.sum * b + merged.sum * a, chunk.out * b[:, None] + merged.out * a[:, None])


def _padded(x: Array, tile: int) -> Array:
    """A tile's rows, with zero rows behind the sequence's end."""
    return np.pad(x, ((0, tile - len(x)), (0, 0))) if len(x) < tile else x
