"""The canonical chunked order on the CPU, in plain fp32: what the kernels do (docs/numerics.md), readable.

Batch-invariant bit for bit like the kernels, but with bits of its own: products are IEEE operations here, not those of
a tensor core.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from cuattn import contract
from cuattn.interop import Tensor, host_bits
from cuattn.problem import Problem
from cuattn.reference import arithmetic
from cuattn.reference.arithmetic import Array, exp2
from cuattn.reference.gold import visible_keys
from cuattn.reference.places import Integers, Sequence, append, sequences_of

#: Rows computed together, as many as keep a tile of scores in a core's cache. Rows do not see each other.
ROWS = 64
_NO_REFERENCE = np.float32(np.finfo(np.float32).min)


@dataclass
class _Partial:
    """An unnormalised result over some keys: reference (rows), sum (rows), out (rows, value_dim)."""

    reference: Array
    sum: Array
    out: Array

    @classmethod
    def empty(cls, *shape: int) -> "_Partial":
        """The result over no keys, for the shape of ``out``."""
        return cls(np.full(shape[:-1], _NO_REFERENCE), np.zeros(shape[:-1], np.float32), np.zeros(shape, np.float32))


@dataclass(frozen=True)
class _Rows:
    """Some rows of a head, query (rows, head_dim), and the keys of their sequence, of which row i sees visible[i]."""

    query: Array
    key: Array
    value: Array
    visible: Integers
    factor: np.float32
    dtype: str

    def chunk(self, start: int, end: int) -> _Partial:
        """The result over the keys start <= j < end."""
        chunk = _Partial.empty(len(self.query), self.value.shape[1])
        tile = contract.key_tile(max(self.key.shape[1], self.value.shape[1]))
        for first in range(start, min(end, int(self.visible[-1])), tile):
            self._add_tile(chunk, first, tile)
        return chunk

    def _add_tile(self, chunk: _Partial, first: int, tile: int) -> None:
        """Online softmax over one tile of keys."""
        key, value = (_padded(x[first : first + tile], tile) for x in (self.key, self.value))
        score = arithmetic.matmul(self.query, key.T)
        score[np.arange(first, first + tile) >= self.visible[:, None]] = -np.inf
        reference = np.maximum(chunk.reference, score.max(axis=1) * self.factor)
        rescale = exp2(chunk.reference - reference)
        weight = exp2(score * self.factor - reference[:, None])
        chunk.reference = reference
        chunk.sum = chunk.sum * rescale + arithmetic.row_sum(weight)
        rounded = arithmetic.widen(arithmetic.narrow(weight, self.dtype), self.dtype)
        chunk.out = chunk.out * rescale[:, None] + arithmetic.matmul(rounded, value)


#: Called with (batch entry, head, tokens) of some rows in the output, and the rows.
_Fill = Callable[[tuple[int, int, slice], _Rows], None]


def forward(problem: Problem, out: Tensor, lse: Tensor) -> None:
    """Fills ``out`` (batch, head, token, column) and ``lse`` (batch, head, token; packed: head, token) on the CPU.

    New keys are first written to the cache.
    """
    if problem.append and problem.sequences:
        append(problem.append, problem.sequences, problem.key, problem.value)
    out_bits = host_bits(out)
    lse_values = host_bits(lse).view(np.float32).reshape(problem.query.shape[:3])

    def fill(place: tuple[int, int, slice], rows: _Rows) -> None:
        merged = _Partial.empty(len(rows.query), problem.value_dim)
        for chunk in range(contract.chunk_count(int(rows.visible[-1]))):
            merged = _merge(merged, rows.chunk(contract.chunk_start(chunk), contract.chunk_start(chunk + 1)))
        out_bits[place], lse_values[place] = _epilogue(merged, out.dtype)

    _for_all_rows(problem, sequences_of(problem), fill)


def forward_partials(
    problem: Problem, out: Tensor, reference: Tensor, sums: Tensor, first_chunk: int, total_keys: int
) -> None:
    """The results of single chunks, first_chunk and following, as `combine` takes them.

    problem: a dense batch without padding, whose keys are those of each sequence from chunk first_chunk on; the whole
        sequence has total_keys.
    out: (chunks, batch, head, token, column); reference, sums: (chunks, batch, head, token); all float32. Where a row
        sees no key of a chunk they are 0, -FLT_MAX and 0.
    """
    results = [host_bits(x).view(np.float32) for x in (reference, sums, out)]
    first_key = contract.chunk_start(first_chunk)
    visible = visible_keys(problem.query_length, total_keys, problem.mask) - first_key
    visible = visible.clip(0, problem.key_length)

    def fill(place: tuple[int, int, slice], rows: _Rows) -> None:
        for chunk in range(out.shape[0]):
            start, end = (contract.chunk_start(first_chunk + chunk + i) - first_key for i in (0, 1))
            partial = rows.chunk(start, end)
            for result, part in zip(results, (partial.reference, partial.sum, partial.out), strict=True):
                result[(chunk, *place)] = part

    _for_all_rows(problem, (replace(x, visible=visible) for x in sequences_of(problem)), fill)


def combine(partials: Iterable[tuple[Tensor, Tensor, Tensor]], out: Tensor, lse: Tensor) -> None:
    """Merges partials (out, reference, sums), ascending over the list and inside along axis 0, into what forward gives.

    Fills ``out`` (batch, head, token, column) and ``lse`` (batch, head, token).
    """
    merged = _Partial.empty(*out.shape)
    with np.errstate(all="ignore"):
        for tensors in partials:
            for part, reference, total in zip(*(host_bits(x).view(np.float32) for x in tensors), strict=True):
                merged = _merge(merged, _Partial(reference, total, part))
        host_bits(out)[...], host_bits(lse).view(np.float32)[...] = _epilogue(merged, out.dtype)


def _for_all_rows(problem: Problem, sequences: Iterable[Sequence], fill: _Fill) -> None:
    """Calls ``fill`` for every block of rows of every head and sequence, from several threads."""
    factor, negate = contract.softmax_factor(problem.scale)
    dtype = problem.query.dtype
    query, key, value = (host_bits(x) for x in (problem.query, problem.key, problem.value))

    def one_head(work: tuple[Sequence, int]) -> None:
        sequence, h = work
        batch, tokens = sequence.queries
        places, key_tokens = sequence.keys
        keys, values = (arithmetic.widen(x[places, h // problem.group, key_tokens], dtype) for x in (key, value))
        for first in range(tokens.start, tokens.stop, ROWS):
            rows = slice(first, min(first + ROWS, tokens.stop))
            queries = arithmetic.widen(query[batch, h, rows], dtype)
            visible = sequence.visible[rows.start - tokens.start : rows.stop - tokens.start]
            with np.errstate(all="ignore"):  # per thread; infinities and NaN take their IEEE course
                queries = -queries if negate else queries
                fill((batch, h, rows), _Rows(queries, keys, values, visible, np.float32(factor), dtype))

    work = [(sequence, h) for sequence in sequences for h in range(problem.query_heads)]
    with ThreadPoolExecutor(min(len(work), os.cpu_count() or 1) or 1) as pool:
        list(pool.map(one_head, work))


def _merge(merged: _Partial, chunk: _Partial) -> _Partial:
    """The left fold over chunks."""
    reference = np.maximum(merged.reference, chunk.reference)
    a, b = exp2(merged.reference - reference), exp2(chunk.reference - reference)
    return _Partial(reference, chunk.sum * b + merged.sum * a, chunk.out * b[..., None] + merged.out * a[..., None])


def _epilogue(merged: _Partial, dtype: str) -> tuple[arithmetic.Bits, Array]:
    """The output's bits and the LSE."""
    empty = (merged.sum == 0) & (merged.reference == _NO_REFERENCE)
    scale = np.where(empty, np.float32(0), np.float32(1) / merged.sum)
    lse = merged.reference * arithmetic.LN2 + arithmetic.natural_log(merged.sum)
    # adding +0 turns -0 into +0
    return arithmetic.narrow(merged.out * scale[..., None] + np.float32(0), dtype), lse


def _padded(x: Array, tile: int) -> Array:
    """A tile's rows, with zero rows behind the sequence's end."""
    return np.pad(x, ((0, tile - len(x)), (0, 0))) if len(x) < tile else x
