"""Negative controls of the checks of gradients: right within rounding, with bits that depend on one thing.

Gradients are linear in dout and dlse. A control cuts dout in two, calls the operation under test with each part, and
adds the two results in fp32: what a kernel does that adds up the parts of several blocks. Parts are opposite quarters
of (contributing row, column), so that every dq, dk and dv is a sum of two. Where rows and columns are cut depends on
that one thing.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.testing.arrays import Bits, library_of, raw_bits, round_to_bits
from cuattn.testing.seen import Call, Seen, host_values
from cuattn.testing.subject import Operation

Which = NDArray[np.bool_]


def non_invariant_gradients(op: Operation, number: Seen) -> Operation:
    """``op`` with dout cut at a place that moves with ``number``, which is made of what `Call` holds.

    It takes the same arguments as ``op``; those for the checks even where ``op`` does not.
    """
    runs = 0

    @functools.wraps(op)
    def cut_op(
        dout: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        lse: Any,
        mask: str,
        *,
        layout: str = "bhsd",
        dlse: Any = None,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        **options: Any,
    ) -> Any:
        nonlocal runs
        if layout != "bhsd":
            options["layout"] = layout
        if cu_seqlens_q is not None:
            options |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        library, (bits, dtype) = library_of(q), raw_bits(dout)
        log_shape = dout.shape[:3] if lse is None else lse.shape
        log_bits = np.zeros(log_shape, np.uint32) if dlse is None else raw_bits(dlse)[0]
        seen_q, seen_k, seen_v = (x.swapaxes(1, 2) if layout == "bshd" else x for x in (q, k, v))
        first, first_log = np.zeros(bits.shape, bool), np.zeros(log_bits.shape, bool)
        wholes = (bits, log_bits, first, first_log)
        for item, (first_key, *views) in enumerate(_sequences(wholes, layout, cu_seqlens_q, cu_seqlens_k)):
            call = Call(seen_q, seen_k, seen_v, mask, layout, item, runs, first_key)
            _divide(int(number(call)), *views)
        runs += 1
        parts = []
        for part, log_part in ((first, first_log), (~first, ~first_log)):
            if dlse is not None:
                options["dlse"] = library.array(_kept(log_bits, log_part), "float32")
            parts.append(op(library.array(_kept(bits, part), dtype), q, k, v, out, lse, mask, **options))
        return tuple(library.array(_sum(a, b, dtype), dtype) for a, b in zip(*parts, strict=True))

    return cut_op


def _sum(one: Any, other: Any, dtype: str) -> Bits:
    with np.errstate(invalid="ignore"):  # NaN is among what the checks feed
        return round_to_bits(host_values(one) + host_values(other), dtype)


def _kept(bits: Bits, part: Which) -> Bits:
    return np.where(part, bits, bits.dtype.type(0))


def _sequences(wholes: Sequence[Any], layout: str, cu_seqlens_q: Any, cu_seqlens_k: Any) -> Iterator[list[Any]]:
    """For each sequence its first key, and its part of each array as a view: (1, H, L, Dv), or (1, H, L) of statistics.

    ``wholes`` have the axes of dout, of the LSE, of dout and of the LSE.
    """
    if cu_seqlens_q is not None:
        ends_q, ends_k = (raw_bits(starts)[0].tolist() for starts in (cu_seqlens_q, cu_seqlens_k))
        heads_first = [whole.swapaxes(0, 1) if whole.ndim == 3 else whole for whole in wholes]
        for (first, last), first_key in zip(pairwise(ends_q), ends_k, strict=False):
            yield [first_key, *(whole[None, :, first:last] for whole in heads_first)]
        return
    if layout == "bshd":
        wholes = [whole.swapaxes(1, 2) if whole.ndim == 4 else whole for whole in wholes]
    for item in range(len(wholes[0])):
        yield [0, *(whole[item : item + 1] for whole in wholes)]


def _divide(number: int, rows: Bits, logs: Bits, part: Which, log_part: Which) -> None:
    """Of the rows that contribute, those before the cut have their first columns in the part, the others their last.

    dlse goes with the first columns: a sum of dq is that of the same two numbers before and after the cut.
    """
    nonzero = (rows << 1 != 0).any(axis=3) | (logs << 1 != 0)  # whatever the sign
    place, columns = nonzero.cumsum(axis=2), rows.shape[3]
    log_part[...] = place <= 1 + number % max(1, int(place.max(initial=0)) - 1)
    part[...] = log_part[..., None] == (np.arange(columns) < 1 + (columns // 2 + number) % (columns - 1))


def gradients_depend_on(number: Seen) -> Callable[[Operation], Operation]:
    """Makes the control of which ``number`` alone moves the bits."""
    return lambda op: non_invariant_gradients(op, number)
