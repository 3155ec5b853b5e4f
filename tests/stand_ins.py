"""Small attention operations in NumPy, good and bad, for the tests of the tests."""

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
) -> Any:
    """`row_by_row` with every keyword that a check may use."""
    if layout == "bshd":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    result, lse = row_by_row(q, k, v, mask, scale=scale)
    if layout == "bshd":
        result = result.swapaxes(1, 2)
    if out is not None:
        out[...] = result
        result = out
    return result, lse


def moving_chunks(q: Any, k: Any, v: Any, mask: str, *, scale: float | None = None, return_lse: bool = True) -> Any:
    """Chunk starts that move with the number of blocks of the launch, as of a kernel that fills a device by splits."""
    return _attend(q, k, v, mask, scale, chunk=8 + 3 * q.shape[0] + q.shape[1] + q.shape[2])


def _attend(q: Any, k: Any, v: Any, mask: str, scale: float | None, chunk: int) -> Any:
    library, dtype = library_of(q), raw_bits(q)[1]
    query, key, value = (values_of(*raw_bits(x)).astype(np.float32) for x in (q, k, v))
    group = query.shape[1] // key.shape[1]
    factor = np.float32(query.shape[-1] ** -0.5 if scale is None else scale)
    out = np.zeros(query.shape, np.float32)
    lse = np.full(query.shape[:3], -np.inf, np.float32)
    counts = visible_keys(query.shape[2], key.shape[2], mask)
    for b, h, i in np.ndindex(*lse.shape):
        for start in range(0, counts[i], chunk):
            keys = slice(start, min(start + chunk, counts[i]))
            scores = (key[b, h // group, keys] * query[b, h, i]).sum(axis=1) * factor
            highest = scores.max()
            weights = np.exp(scores - highest)
            part_lse = highest + np.log(weights.sum())
            # A sum over the first axis adds row after row, whatever their number.
            part = (weights[:, None] * value[b, h // group, keys]).sum(axis=0) / weights.sum()
            with np.errstate(invalid="ignore"):  # of NaN
                merged = part_lse if start == 0 else np.logaddexp(lse[b, h, i], part_lse)
            out[b, h, i] = out[b, h, i] * np.exp(lse[b, h, i] - merged) + part * np.exp(part_lse - merged)
            lse[b, h, i] = merged
    bits = round_to_bits(out + np.float32(0), dtype)
    return library.array(bits, dtype), library.array(lse.view(np.uint32), "float32")
