"""The backward pass on the CPU, in the canonical order and plain fp32: what the kernels do, readable.

Batch-invariant bit for bit like the kernels, with bits of its own, as in canonical.py. docs/numerics.md, section 8.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cuattn import contract
from cuattn.interop import Tensor, host_bits
from cuattn.problem import Gradients, Problem, Upstream
from cuattn.reference import arithmetic
from cuattn.reference.arithmetic import Array
from cuattn.reference.canonical import ROWS
from cuattn.reference.places import Integers, Sequence, sequences_of


@dataclass(frozen=True)
class _Rows:
    """Some rows of a head: query (rows, head_dim), dout (rows, value_dim), and what is known of each of them.

    log: the LSE in the log2 domain; delta: dout times out less dlse; visible: keys that it sees; all (rows).
    """

    query: Array
    dout: Array
    log: Array
    delta: Array
    visible: Integers

    def __getitem__(self, index: slice | Integers) -> "_Rows":
        return _Rows(self.query[index], self.dout[index], self.log[index], self.delta[index], self.visible[index])


@dataclass(frozen=True)
class _Keys:
    """The keys and values of a head of one sequence, (keys, head_dim) and (keys, value_dim)."""

    key: Array
    value: Array
    factor: np.float32
    negate: bool
    dtype: str

    def weights(self, rows: _Rows) -> tuple[Array, Array]:
        """P and dS (rows, keys), both rounded to the dtype, of the keys that any of the rows sees."""
        end = int(rows.visible.max())
        score = arithmetic.matmul(-rows.query if self.negate else rows.query, self.key[:end].T)
        seen = np.arange(end) < rows.visible[:, None]
        weight = np.where(seen, arithmetic.exp2(score * self.factor - rows.log[:, None]), np.float32(0))
        dweight = arithmetic.matmul(rows.dout, self.value[:end].T)
        dscore = weight * (dweight - rows.delta[:, None])
        p, ds = (arithmetic.widen(arithmetic.narrow(x, self.dtype), self.dtype) for x in (weight, dscore))
        return p, ds


def backward(problem: Problem, upstream: Upstream, gradients: Gradients) -> None:
    """Fills the gradients of queries, keys and values on the CPU."""
    for tensor in (gradients.query, gradients.key, gradients.value):
        host_bits(tensor)[...] = 0
    if problem.key_heads == 0:
        return
    work = [(sequence, head) for sequence in sequences_of(problem) for head in range(problem.key_heads)]
    with ThreadPoolExecutor(min(len(work), os.cpu_count() or 1) or 1) as pool:
        list(pool.map(lambda item: _one_key_head(problem, upstream, gradients, *item), work))


def _one_key_head(problem: Problem, upstream: Upstream, gradients: Gradients, sequence: Sequence, head: int) -> None:
    dtype, scale = problem.query.dtype, np.float32(problem.scale)
    factor, negate = contract.softmax_factor(problem.scale)
    batch, tokens = sequence.queries
    places, key_tokens = sequence.keys
    key, value = (arithmetic.widen(host_bits(x)[places, head, key_tokens], dtype) for x in (problem.key, problem.value))
    keys = _Keys(key, value, np.float32(factor), negate, dtype)
    dkey, dvalue = np.zeros_like(key), np.zeros_like(value)
    with np.errstate(all="ignore"):  # per thread; infinities and NaN take their IEEE course
        for h in range(head * problem.group, (head + 1) * problem.group):
            place = batch, h, tokens
            rows, contributing = _rows_of(problem, upstream, place, sequence.visible)
            dquery = np.zeros((len(sequence.visible), key.shape[1]), np.float32)
            for first in range(0, len(contributing), ROWS):
                some = contributing[first : first + ROWS]
                part = rows[some]
                weight, dscore = keys.weights(part)
                end = weight.shape[1]
                arithmetic.add_matmul(dvalue[:end], weight.T, part.dout)
                arithmetic.add_matmul(dkey[:end], dscore.T, part.query)
                dquery[some] = arithmetic.matmul(dscore, key[:end])
            host_bits(gradients.query)[place] = _finished(dquery * scale, dtype)
        host_bits(gradients.key)[places, head, key_tokens] = _finished(dkey * scale, dtype)
        host_bits(gradients.value)[places, head, key_tokens] = _finished(dvalue, dtype)


def _rows_of(
    problem: Problem, upstream: Upstream, place: tuple[int, int, slice], visible: Integers
) -> tuple[_Rows, Integers]:
    """The rows at a place, and the numbers of those that contribute."""
    dtype = problem.query.dtype
    query, out, dout = (
        arithmetic.widen(host_bits(x)[place], dtype) for x in (problem.query, upstream.out, upstream.dout)
    )
    lse = _statistics(upstream.lse, problem)[place]
    dlse = _statistics(upstream.dlse, problem)[place] if upstream.dlse else np.zeros_like(lse)
    delta = arithmetic.matmul(dout[:, None], out[:, :, None])[:, 0, 0] - dlse
    rows = _Rows(query, dout, lse * arithmetic.LOG2_E, delta, visible)
    return rows, np.flatnonzero((visible > 0) & ((dout != 0).any(axis=1) | (dlse != 0)))


def _statistics(tensor: Tensor, problem: Problem) -> Array:
    """(batch, head, token) of an LSE or its gradient."""
    values: Array = host_bits(tensor).view(np.float32).reshape(problem.query.shape[:3])
    return values


def _finished(x: Array, dtype: str) -> arithmetic.Bits:
    return arithmetic.narrow(x + np.float32(0), dtype)  # adding +0 turns -0 into +0
