"""Small calls that go through every kernel and every public function, the same on each backend and array library.

A call takes a `cuattn.testing.Library`, which makes its arrays, and returns the arrays that it computed or changed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

import cuattn
from cuattn.testing import Library
from cuattn.testing.arrays import Bits, int32_array, round_to_bits
from cuattn.testing.subject import Placement, contiguous, padded

Call = Callable[[Library], Sequence[Any]]
#: Keys of three sequences: none, some of one chunk, and four chunks.
LENGTHS = (0, 203, 1900)


def normal_bits(shape: tuple[int, ...], dtype: str, seed: int) -> Bits:
    """Normal random numbers."""
    random = np.random.Generator(np.random.Philox(key=seed))
    return round_to_bits(random.standard_normal(shape, np.float32), dtype)


def normal(library: Library, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    """Normal random numbers, the same in every library."""
    return library.array(normal_bits(shape, dtype, seed), dtype)


def dense(
    library: Library,
    lengths: tuple[int, int],
    mask: str = "causal",
    dtype: str = "bfloat16",
    head_dim: int = 64,
    value_dim: int | None = None,
    heads: tuple[int, int] = (4, 2),
    **options: Any,
) -> Sequence[Any]:
    """`attention` on two sequences of (query rows, keys) with (query heads, key heads)."""
    shapes = (
        (2, heads[0], lengths[0], head_dim),
        (2, heads[1], lengths[1], head_dim),
        (2, heads[1], lengths[1], value_dim or head_dim),
    )
    q, k, v = (normal(library, shape, dtype, seed) for seed, shape in enumerate(shapes))
    result: Sequence[Any] = cuattn.attention(q, k, v, mask, return_lse=True, **options)
    return result


def padding(library: Library, keys: int) -> Any:
    """Left padding, and holes."""
    exists = np.ones((2, keys), np.uint8)
    exists[0, : keys // 7] = exists[1, 3::7] = 0
    return library.array(exists, "bool")


def masked(library: Library, rows: int) -> Sequence[Any]:
    return dense(library, (rows, 700), key_padding_mask=padding(library, 700))


def packed(library: Library, queries: Sequence[int], keys: Sequence[int]) -> tuple[list[Any], list[Any]]:
    """[q, k, v] of packed sequences, and their cumulative lengths."""
    starts = [int32_array(library, list(accumulate(lengths, initial=0))) for lengths in (queries, keys)]
    shapes = (sum(queries), 4, 64), (sum(keys), 2, 64), (sum(keys), 2, 64)
    return [normal(library, shape, "float16", seed) for seed, shape in enumerate(shapes)], starts


def varlen(library: Library) -> Sequence[Any]:
    arrays, starts = packed(library, (1, 0, 130, 40), (530, 3, 200, 40))
    result: Sequence[Any] = cuattn.attention_varlen(*arrays, *starts, "causal", return_lse=True)
    return result


def backward(
    library: Library,
    lengths: tuple[int, int],
    mask: str = "causal",
    dtype: str = "bfloat16",
    head_dim: int = 64,
    value_dim: int | None = None,
    heads: tuple[int, int] = (4, 2),
    holes: bool = False,
    place: Placement = contiguous,
) -> Sequence[Any]:
    """The gradients of what `dense` computes; some rows contribute nothing, and the query of one of them is NaN."""
    value_dim = value_dim or head_dim
    rows = heads[0], lengths[0]
    shapes = (
        *((*rows, head_dim), (heads[1], lengths[1], head_dim), (heads[1], lengths[1], value_dim)),
        (*rows, value_dim),
    )
    bits = [normal_bits((2, *shape), dtype, seed) for seed, shape in enumerate(shapes)]
    dlse = normal_bits((2, *rows), "float32", len(bits))
    bits[3][:, :, 1::9] = dlse[:, :, 1::9] = 0
    bits[0][0, 0, 1] = np.iinfo(bits[0].dtype).max
    q, k, v, dout = (place(library, x, dtype) for x in bits)
    options = {"key_padding_mask": padding(library, lengths[1])} if holes else {}
    out, lse = cuattn.attention(q, k, v, mask, return_lse=True, **options)
    return cuattn.attention_backward(dout, q, k, v, out, lse, mask, dlse=library.array(dlse, "float32"), **options)


def varlen_backward(library: Library) -> Sequence[Any]:
    queries, keys = (1, 0, 70, 20), (133, 3, 100, 20)
    arrays, starts = packed(library, queries, keys)
    out, lse = cuattn.attention_varlen(*arrays, *starts, "causal", return_lse=True)
    dout = normal(library, (sum(queries), 4, 64), "float16", 3)
    return cuattn.attention_varlen_backward(dout, *arrays, out, lse, *starts, "causal")


def cached(
    library: Library, rows: Sequence[int], page_size: int = 0, append: bool = False, **options: Any
) -> Sequence[Any]:
    """`attention_kvcache` for sequences of these numbers of rows, packed if they differ; also returns the caches."""
    capacity, packed = 2000, len(set(rows)) > 1
    pages = -(-capacity // page_size) if page_size else 0
    outer = (3 * pages, page_size) if page_size else (3, capacity)
    tokens = (sum(rows),) if packed else (3, rows[0])
    shapes = (*tokens, 8, 128), (*outer, 2, 128), (*outer, 2, 128), (*tokens, 2, 128), (*tokens, 2, 128)
    q, k, v, k_new, v_new = (normal(library, shape, "bfloat16", seed) for seed, shape in enumerate(shapes))
    if page_size:
        order = np.random.default_rng(0).permutation(3 * pages).astype(np.int32).reshape(3, pages)
        options["block_table"] = library.array(order.view(np.uint32), "int32")
    if packed:
        options["cu_seqlens_q"] = int32_array(library, list(accumulate(rows, initial=0)))
    if append:
        options |= {"k_new": k_new, "v_new": v_new}
    out, lse = cuattn.attention_kvcache(q, k, v, int32_array(library, LENGTHS), return_lse=True, **options)
    return out, lse, k, v


def append(library: Library, lengths: Sequence[int] = (0, 77, 295)) -> Sequence[Any]:
    """Five new keys for each of three sequences, in caches of 300."""
    shapes = (3, 300, 2, 64), (3, 300, 2, 32), (3, 5, 2, 64), (3, 5, 2, 32)
    k, v, k_new, v_new = (normal(library, shape, "float16", seed) for seed, shape in enumerate(shapes))
    cuattn.append_kv(k_new, v_new, k, v, int32_array(library, lengths))
    return k, v


def parts(library: Library) -> Sequence[Any]:
    """Two shards of the keys, merged."""
    shapes = (2, 4, 20, 128), (2, 2, 1600, 128), (2, 2, 1600, 128)
    q, k, v = (normal(library, shape, "float16", seed) for seed, shape in enumerate(shapes))
    cut = cuattn.chunk_starts(1600)[2]
    shards = [
        cuattn.attention_partials(q, k[:, :, first:end], v[:, :, first:end], "causal", first_key=first, total_keys=1600)
        for first, end in ((0, cut), (cut, 1600))
    ]
    result: Sequence[Any] = cuattn.combine(shards, dtype="float16", return_lse=True)
    return result


CALLS: dict[str, Call] = {
    "many rows": partial(dense, lengths=(113, 603)),
    "many rows, 72 columns": partial(dense, lengths=(70, 203), mask="full", dtype="float16", head_dim=72),
    "few rows": partial(dense, lengths=(3, 1900), heads=(8, 2)),
    "few rows, 4 splits": partial(dense, lengths=(3, 1900), heads=(8, 2), num_splits=4),
    "256 columns": partial(dense, lengths=(70, 300), head_dim=256),
    "256 columns, few rows": partial(dense, lengths=(1, 700), head_dim=256),
    "192 and 128 columns": partial(dense, lengths=(70, 300), dtype="float16", head_dim=192, value_dim=128),
    "fp32": partial(dense, lengths=(70, 203), dtype="float32"),
    "fp32, few rows": partial(dense, lengths=(2, 700), dtype="float32"),
    "mask": partial(masked, rows=70),
    "mask, few rows": partial(masked, rows=2),
    "varlen": varlen,
    "cache": partial(cached, rows=(1, 1, 1)),
    "pages, append": partial(cached, rows=(1, 1, 1), page_size=16, append=True),
    "pages, rows few and many": partial(cached, rows=(2, 40, 1), page_size=48, append=True),
    "append": append,
    "parts": parts,
    "backward": partial(backward, lengths=(70, 133)),
    "backward, full": partial(backward, lengths=(70, 133), mask="full", dtype="float16", heads=(2, 2)),
    "backward, strides": partial(backward, lengths=(37, 70), place=padded),
    "backward, holes": partial(backward, lengths=(70, 203), holes=True),
    "backward, 128 columns": partial(backward, lengths=(70, 133), head_dim=128),
    "backward, 192 and 128 columns": partial(backward, lengths=(37, 70), mask="full", head_dim=192, value_dim=128),
    "backward, 256 columns": partial(backward, lengths=(37, 70), dtype="float16", head_dim=256, heads=(2, 1)),
    "backward, fp32": partial(backward, lengths=(37, 70), dtype="float32", heads=(2, 1)),
    "backward, varlen": varlen_backward,
}
