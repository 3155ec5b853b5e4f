"""`cuattn.attention_kvcache` and `cuattn.append_kv`: keys and values that grow in place, contiguous or in pages."""

from typing import Any

from cuattn import backend, calls
from cuattn.checks import check_append


def attention_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    cache_lengths: Any,
    *,
    block_table: Any = None,
    k_new: Any = None,
    v_new: Any = None,
    cu_seqlens_q: Any = None,
    mask: str | None = "causal",
    scale: float | None = None,
    return_lse: bool = False,
    out: Any = None,
    num_splits: int | None = None,
    layout: str = "bshd",
    check: bool | None = None,
) -> Any:
    """`attention` over a cache of keys and values, to which new ones may be appended in the same call.

    q: (B, Lq, Hq, D); with ``layout="bhsd"`` (B, Hq, Lq, D). Dtypes, heads, head dims, strides and array libraries as
        in `attention`.
    k_cache, v_cache: (B, Lmax, Hkv, D) and (B, Lmax, Hkv, Dv); paged, that is with a ``block_table``, (pages,
        page_size, Hkv, D), any page size. With ``layout="bhsd"`` (B, Hkv, Lmax, D), (pages, Hkv, page_size, D).
    cache_lengths: int32 (B,), contiguous, on the same device: keys of each sequence in the cache before the new ones.
        Not changed.
    block_table: int32 (B, max_pages), contiguous: key j of sequence b is row ``j % page_size`` of page
        ``block_table[b, j // page_size]``. Pages may be shared, but no two new keys may go to one place.
    k_new, v_new: (B, Lq, Hkv, D) and (B, Lq, Hkv, Dv), in the layout of q: one key and value for each query row. They
        are written in place to the positions cache_lengths[b] to cache_lengths[b] + Lq - 1 of the caches and then
        attended to: sequence b has cache_lengths[b] + Lq keys. The caches must then be writable, have memory of their
        own for every element and overlap none of the other arrays, nor require gradients while torch records them.
        Without them sequence b has cache_lengths[b] keys: the caller has appended already.
    cu_seqlens_q: int32 (B + 1,), contiguous: sequences with different numbers of rows, packed one behind the other as
        in `attention_varlen`. q is (Tq, Hq, D), k_new and v_new are (Tq, Hkv, D) and (Tq, Hkv, Dv), the caches as with
        ``layout="bshd"``, which is then the only layout.
    mask: "causal" (bottom-right aligned: row i of Lq sees the first ``keys - Lq + i + 1`` keys of its sequence), or
        "full" (or None). A row that sees no key is +0, with the LSE -inf.
    scale, out, num_splits: as in `attention`.
    return_lse: also return the LSE, float32, contiguous (B, Hq, Lq), or (Hq, Tq) with cu_seqlens_q.
    check: True: the numbers in cache_lengths, block_table and cu_seqlens_q are read and checked first, for which the
        call waits for the GPU and cannot be captured in a CUDA graph. None: where CUATTN_CHECK=1. On the CPU they are
        always checked. Unchecked, a length beyond the capacity (Lmax, or max_pages * page_size) is clamped to it and
        new keys beyond it are not written; a page outside the cache is clamped for reading and not written to.

    Returns the output, (B, Lq, Hq, Dv) or (Tq, Hq, Dv), of q's dtype, array library and device, or ``(output, lse)``.
    Cache slots without a key are not read, whatever they hold. Stream, CUDA graphs and workspace as in `attention`,
    where the longest possible sequence is the capacity.

    Guarantee: every row has the bits that `attention` gives for the keys and values of its sequence alone, one behind
    the other: in pages of any size and order or contiguous, appended at once or token by token.

    Raises ValueError or TypeError for wrong arguments, before anything is launched or written; others as `attention`.
    """
    return calls.attention_kvcache(
        q,
        k_cache,
        v_cache,
        cache_lengths,
        block_table,
        k_new,
        v_new,
        cu_seqlens_q,
        mask,
        scale,
        num_splits,
        layout,
        check,
        out,
        return_lse,
    )


def append_kv(
    k_new: Any,
    v_new: Any,
    k_cache: Any,
    v_cache: Any,
    cache_lengths: Any,
    *,
    block_table: Any = None,
    cu_seqlens: Any = None,
    layout: str = "bshd",
    check: bool | None = None,
) -> None:
    """Writes new keys and values in place into a cache, as `attention_kvcache` does before it attends to them.

    k_new, v_new: (B, L, Hkv, D) and (B, L, Hkv, Dv); with ``layout="bhsd"`` (B, Hkv, L, D); with cu_seqlens (T, Hkv, D)
        and (T, Hkv, Dv). They go to the positions cache_lengths[b] to cache_lengths[b] + L - 1.
    cu_seqlens: int32 (B + 1,), contiguous: cumulative numbers of new keys of sequences packed one behind the other; the
        layout is then "bshd".
    k_cache, v_cache, cache_lengths, block_table, check: as in `attention_kvcache`. cache_lengths is not changed.

    The bits are copied as they are. On a GPU the work is queued on the caller's current stream without synchronising.

    Raises ValueError or TypeError for wrong arguments, before anything is written.
    """
    call = check_append(k_new, v_new, k_cache, v_cache, cache_lengths, block_table, cu_seqlens, layout, check)
    backend.active().for_device(call.key.device, "k_new")
    calls.append(call.append, call.sequences, call.key, call.value)
