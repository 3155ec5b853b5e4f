"""Negative controls: operations that are right within rounding, whose bits depend on one thing that they must not see.

Each wraps the operation under test, cuts the keys of each sequence in two, and merges the two results in fp32: what a
kernel does whose chunk starts move. Where the cut lies depends on that one thing. A check that such an operation
passes checks nothing. The LSE that merging needs is worked out here for an operation that returns none.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.reference.gold import gold_attention
from cuattn.testing.arrays import int32_array, library_of, raw_bits, round_to_bits
from cuattn.testing.seen import Call, Seen, host_values
from cuattn.testing.subject import Operation, returns_lse

#: The cut is at least FIRST_CUT keys into the sequence and less than FIRST_CUT + CUTS; fewer keys are not cut.
FIRST_CUT = 16
CUTS = 31

Both = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class _Sequence:
    """One sequence of a call, of batch size 1: q (1, Hq, Lq, D), k and v (1, Hkv, Lk, D), and which keys exist."""

    q: Any
    k: Any
    v: Any
    first_key: int = 0
    length: int | None = None  # None: all
    exists: Any = None  # bool (1, Lk); None: all

    def attend(self, op: Operation, rows: slice, keys: slice, mask: str, options: dict[str, Any]) -> Both:
        """``op`` on some rows and keys; (out, lse) in fp32 on the host."""
        arrays = (self.q[:, :, rows], self.k[:, :, keys], self.v[:, :, keys])
        library, more, existing = library_of(self.k), {}, arrays[1].shape[2]
        if self.length is not None:
            existing = min(max(self.length - (keys.start or 0), 0), existing)
            more["kv_lengths"] = int32_array(library, [existing])
        if self.exists is not None:
            more["key_padding_mask"] = self.exists[:, keys]
        results = op(*arrays, mask, **options, **more)
        if returns_lse(op):
            out, lse = results
            return host_values(out), host_values(lse)
        exists = (np.arange(arrays[1].shape[2]) < existing)[None]
        if self.exists is not None:
            exists &= raw_bits(more["key_padding_mask"])[0].astype(bool)
        query, key, value = (host_values(x).astype(np.float64) for x in arrays)
        with np.errstate(invalid="ignore"):  # NaN is among what the checks feed
            _, gold_lse = gold_attention(query, key, value, mask, options.get("scale"), exists)
        return host_values(results), gold_lse.astype(np.float32)


def non_invariant(op: Operation, number: Seen) -> Operation:
    """``op`` with its keys cut at a point that moves with ``number``, which is made of what `Call` holds.

    It takes the same arguments as ``op``; those for the checks even where ``op`` does not.
    """
    runs = 0

    @functools.wraps(op)
    def cut_op(
        q: Any,
        k: Any,
        v: Any,
        mask: str,
        *,
        layout: str = "bhsd",
        num_splits: int | None = None,
        shards: int | None = None,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        kv_lengths: Any = None,
        key_padding_mask: Any = None,
        cache_lengths: Any = None,
        block_table: Any = None,
        k_new: Any = None,
        v_new: Any = None,
        **options: Any,
    ) -> Any:
        nonlocal runs
        if layout == "bshd":
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        library, dtype = library_of(q), raw_bits(q[:0])[1]
        packed = cu_seqlens_q is not None
        if packed:
            sequences = _unpacked(q, k, v, cu_seqlens_q, cu_seqlens_k)
        elif cache_lengths is not None:
            cache = {"cache_lengths": cache_lengths, "block_table": block_table, "k_new": k_new, "v_new": v_new}
            op(q, k, v, mask, **cache, **options)  # appends
            sequences = _cached(q, k, v, raw_bits(cache_lengths)[0] + q.shape[2], block_table)
        else:
            sequences = _unbatched(q, k, v, kv_lengths, key_padding_mask)
        results = []
        for item, own in enumerate(sequences):
            call = Call(q, k, v, mask, layout, item, runs, own.first_key, num_splits, shards)
            results.append(_attend_in_two(op, own, mask, FIRST_CUT + number(call) % CUTS, options))
        runs += 1
        out, lse = (np.concatenate(part, axis=2 if packed else 0) for part in zip(*results, strict=True))
        if packed:
            out, lse = out[0].swapaxes(0, 1), lse[0]
        if layout == "bshd":
            out = out.swapaxes(1, 2)
        output = library.array(round_to_bits(out, dtype), dtype)
        return (output, library.array(lse.view(np.uint32), "float32")) if returns_lse(op) else output

    return cut_op


def _unbatched(q: Any, k: Any, v: Any, kv_lengths: Any, key_padding_mask: Any) -> list[_Sequence]:
    lengths = None if kv_lengths is None else raw_bits(kv_lengths)[0].tolist()
    sequences = []
    for item in range(q.shape[0]):
        alone = slice(item, item + 1)
        length = None if lengths is None else lengths[item]
        exists = None if key_padding_mask is None else key_padding_mask[alone]
        sequences.append(_Sequence(q[alone], k[alone], v[alone], length=length, exists=exists))
    return sequences


def _unpacked(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any) -> list[_Sequence]:
    def alone(packed: Any, first: int, last: int) -> Any:
        return packed[first:last].swapaxes(0, 1)[None]

    rows, keys = (pairwise(raw_bits(starts)[0].tolist()) for starts in (cu_seqlens_q, cu_seqlens_k))
    return [_Sequence(alone(q, *r), alone(k, *s), alone(v, *s), s[0]) for r, s in zip(rows, keys, strict=True)]


def _cached(q: Any, k: Any, v: Any, lengths: NDArray[np.uint32], block_table: Any) -> list[_Sequence]:
    """The sequences of a cache, copied out of it."""
    library = library_of(q)
    pages = None if block_table is None else raw_bits(block_table)[0]

    def alone(item: int, cache: Any) -> Any:
        bits, dtype = raw_bits(cache)
        own = bits[item] if pages is None else np.concatenate(bits[pages[item]], axis=1)
        return library.array(own[None, :, : lengths[item]], dtype)

    firsts = [0] * len(lengths) if pages is None else (pages[:, 0] * k.shape[2]).tolist()
    return [_Sequence(q[i : i + 1], alone(i, k), alone(i, v), first) for i, first in enumerate(firsts)]


def _attend_in_two(op: Operation, sequence: _Sequence, mask: str, cut: int, options: dict[str, Any]) -> Both:
    """Keys before and after ``cut`` on their own, merged by their LSE; (out, lse) in fp32 on the host."""

    def attend(rows: slice, keys: slice, mask: str) -> Both:
        return sequence.attend(op, rows, keys, mask, options)

    len_q, len_k = sequence.q.shape[2], sequence.k.shape[2]
    if len_k <= cut:
        return attend(slice(None), slice(None), mask)
    # Causal rows before `whole` see fewer keys than `cut`.
    whole = 0 if mask == "full" else max(0, cut - 1 - (len_k - len_q))
    early = [attend(slice(whole), slice(cut - 1), mask)] if whole else []
    cut_rows = slice(whole, None)
    (out_a, lse_a), (out_b, lse_b) = attend(cut_rows, slice(cut), "full"), attend(cut_rows, slice(cut, None), mask)
    with np.errstate(invalid="ignore"):  # NaN is among what the checks feed
        lse = np.logaddexp(lse_a, lse_b)
        out = out_a * np.exp(lse_a - lse)[..., None] + out_b * np.exp(lse_b - lse)[..., None]
    late = [(out, lse)]
    return tuple(np.concatenate(part, axis=2) for part in zip(*early, *late, strict=True))  # type: ignore[return-value]


def depends_on(number: Seen) -> Callable[[Operation], Operation]:
    """Makes the control of which ``number`` alone moves the bits."""
    return lambda op: non_invariant(op, number)


def leaves_a_sequence_unwritten(op: Operation) -> Operation:
    """The last sequence of an array given as ``out`` keeps what it held."""

    @functools.wraps(op)
    def lazy_op(q: Any, k: Any, v: Any, mask: str, *, out: Any = None, **options: Any) -> Any:
        if out is not None:
            op(q[:-1], k[:-1], v[:-1], mask, out=out[:-1], **options)
        results = op(q, k, v, mask, **options)
        if out is None:
            return results
        return (out, results[1]) if returns_lse(op) else out

    return lazy_op
