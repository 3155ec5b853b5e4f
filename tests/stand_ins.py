"""Small attention operations in NumPy, good and bad, for the tests of the tests."""

from itertools import pairwise
from typing import Any

import numpy as np

from cuattn.reference.gold import visible_keys
from cuattn.testing.arrays import library_of, raw_bits, round_to_bits, values_of


def row_by_row(q: Any, k: Any, v: Any, mask: str, *, scale: float | None = None, return_lse: bool = True) -> Any:
    """Each row on its own, in one fixed order: batch-invariant."""
    return _attend(q, k, v, mask, scale, chunk=1 << 30)


def with_keywords(
    q: Any,
    k: Any,
    v: Any,
    mask: str,
    *,
    scale: float | None = None,
    return_lse: bool = True,
    layout: str = "bhsd",
    num_splits: int | None = None,
    out: Any = None,
    kv_lengths: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    key_padding_mask: Any = None,
    cache_lengths: Any = None,
    block_table: Any = None,
    k_new: Any = None,
    v_new: Any = None,
    shards: int | None = None,
) -> Any:
    """`row_by_row` with every keyword that a check may use."""
    if cu_seqlens_q is not None:
        return _packed(q, k, v, mask, scale, cu_seqlens_q, cu_seqlens_k)
    if cache_lengths is not None:
        return _cached(q, k, v, mask, scale, cache_lengths, block_table, k_new, v_new)
    if layout == "bshd":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    exists = np.ones((k.shape[0], k.shape[2]), bool)
    if kv_lengths is not None:
        exists &= np.arange(k.shape[2]) < raw_bits(kv_lengths)[0][:, None]
    if key_padding_mask is not None:
        exists &= raw_bits(key_padding_mask)[0].astype(bool)
    result, lse = _attend(q, k, v, mask, scale, chunk=1 << 30, exists=exists)
    if layout == "bshd":
        result = result.swapaxes(1, 2)
    if out is not None:
        out[...] = result
        result = out
    return result, lse


def moving_chunks(q: Any, k: Any, v: Any, mask: str, *, scale: float | None = None, return_lse: bool = True) -> Any:
    """Chunk starts that move with the number of blocks of the launch, as of a kernel that fills a device by splits."""
    return _attend(q, k, v, mask, scale, chunk=8 + 3 * q.shape[0] + q.shape[1] + q.shape[2])


def _packed(q: Any, k: Any, v: Any, mask: str, scale: float | None, starts_q: Any, starts_k: Any) -> Any:
    library, dtype = library_of(q), raw_bits(q)[1]
    results = []
    spans = (pairwise(raw_bits(starts)[0].tolist()) for starts in (starts_q, starts_k))
    for rows, keys in zip(*spans, strict=True):
        one = (x[slice(*span)].swapaxes(0, 1)[None] for x, span in ((q, rows), (k, keys), (v, keys)))
        results.append([raw_bits(part)[0][0] for part in row_by_row(*one, mask, scale=scale)])
    out, lse = (np.concatenate(parts, axis=1) for parts in zip(*results, strict=True))
    return library.array(out.swapaxes(0, 1), dtype), library.array(lse, "float32")


def _cached(
    q: Any, k: Any, v: Any, mask: str, scale: float | None, lengths: Any, table: Any, k_new: Any, v_new: Any
) -> Any:
    library, dtype = library_of(q), raw_bits(q)[1]
    results = []
    for b, length in enumerate(raw_bits(lengths)[0].tolist()):
        total = length + q.shape[2]
        keys = np.arange(total)
        if table is None:
            pages, tokens = np.full(total, b), keys
        else:
            pages, tokens = raw_bits(table)[0][b, keys // k.shape[2]].astype(np.int64), keys % k.shape[2]
        for i, (page, token) in enumerate(zip(pages[length:], tokens[length:], strict=True)):
            k[page, :, token], v[page, :, token] = k_new[b, :, i], v_new[b, :, i]
        own = (x[list(pages), :, list(tokens)].swapaxes(0, 1)[None] for x in (k, v))
        results.append([raw_bits(part)[0] for part in row_by_row(q[b : b + 1], *own, mask, scale=scale)])
    out, lse = (np.concatenate(parts) for parts in zip(*results, strict=True))
    return library.array(out, dtype), library.array(lse, "float32")


def _attend(q: Any, k: Any, v: Any, mask: str, scale: float | None, chunk: int, exists: Any = None) -> Any:
    """exists: bool (B, Lk), None for all keys."""
    library, dtype = library_of(q), raw_bits(q)[1]
    query, key, value = (values_of(*raw_bits(x)).astype(np.float32) for x in (q, k, v))
    group = query.shape[1] // key.shape[1]
    factor = np.float32(query.shape[-1] ** -0.5 if scale is None else scale)
    out = np.zeros((*query.shape[:3], value.shape[3]), np.float32)
    lse = np.full(query.shape[:3], -np.inf, np.float32)
    counts = visible_keys(query.shape[2], key.shape[2], mask)
    for b, h, i in np.ndindex(*lse.shape):
        seen = np.arange(counts[i]) if exists is None else np.flatnonzero(exists[b, : counts[i]])
        for start in range(0, len(seen), chunk):
            keys = seen[start : start + chunk]
            scores = (key[b, h // group][keys] * query[b, h, i]).sum(axis=1) * factor
            highest = scores.max()
            weights = np.exp(scores - highest)
            part_lse = highest + np.log(weights.sum())
            # A sum over the first axis adds row after row, whatever their number.
            part = (weights[:, None] * value[b, h // group][keys]).sum(axis=0) / weights.sum()
            with np.errstate(invalid="ignore"):  # of NaN
                merged = part_lse if start == 0 else np.logaddexp(lse[b, h, i], part_lse)
            out[b, h, i] = out[b, h, i] * np.exp(lse[b, h, i] - merged) + part * np.exp(part_lse - merged)
            lse[b, h, i] = merged
    bits = round_to_bits(out + np.float32(0), dtype)
    return library.array(bits, dtype), library.array(lse.view(np.uint32), "float32")
