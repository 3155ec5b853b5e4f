"""The functions of flash-attn 2, batch-invariant: the same names, arguments, defaults, layouts and results.

Common to all of them:

dtypes: float16, bfloat16 and, unlike flash-attn, float32. torch tensors on one device; on the CPU the reference backend
    computes. Head dims up to 256; those that are no multiples of 8 are copied with zeros behind them, but not in a
    cache, where they are refused. Memory of any form: what kernels cannot read in place is copied; caches never are.
softmax_scale: finite float, headdim**-0.5 by default.
causal: aligned bottom-right: query i sees the keys j <= i + seqlen_k - seqlen_q. A row that sees no key is +0, with the
    LSE -inf (flash-attn: inf, or -inf where it splits the keys).
deterministic: accepted; everything here is deterministic, the gradients too.
return_attn_probs: the result is (out, softmax_lse, None): no probabilities are computed.
max_seqlen, max_seqlen_q, max_seqlen_k: not needed and not used.
dropout_p, window_size, softcap, alibi_slopes, and cache_leftpad, rotary_cos and rotary_sin of a cache: any other values
    than the defaults raise NotImplementedError; a softcap below 0 means none.

Gradients flow through all functions but those that read a cache. Streams, CUDA graphs, torch.compile and errors are
those of the function of cuattn that computes; in its messages q, k, v, k_cache and v_cache have these names,
cache_seqlens is cache_lengths, and the k and v to append are k_new and v_new.

Guarantee: that of cuattn: a row's bits depend on its query, on the keys and values that it sees, in their order, and on
the scale, and on nothing else in the call. Through any of these functions they are those of `cuattn.attention`.
"""

from collections.abc import Sequence
from typing import Any

from cuattn.api import attention, attention_varlen
from cuattn.cache import append_kv, attention_kvcache
from cuattn.compat.tensors import attend, check_tensors, readable, require, require_absent

Window = Sequence[int]


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q (batch, seqlen_q, nheads, headdim) over k and v (batch, seqlen_k, nheads_k, headdim).

    nheads is a multiple of nheads_k. The head dim of v may differ.

    Returns (batch, seqlen_q, nheads, headdim of v), or (out, softmax_lse, None) with the LSE float32
    (batch, nheads, seqlen_q). Arguments, errors and guarantee: see the module.
    """
    check_tensors(q=q, k=k, v=v)
    _refuse(dropout_p, window_size, softcap, alibi_slopes)
    mask = _mask(causal)
    result = attend(attention, q, k, v, mask, scale=softmax_scale, return_lse=return_attn_probs, layout="bshd")
    return _handed_back(result, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Any,
    kv: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of keys and values in one tensor, kv: (batch, seqlen_k, 2, nheads_k, headdim)."""
    k, v = _parts("kv", kv, 5, 2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *options)


def flash_attn_qkvpacked_func(
    qkv: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of one tensor, qkv: (batch, seqlen, 3, nheads, headdim)."""
    q, k, v = _parts("qkv", qkv, 5, 3)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *options)


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Any:
    """Attention of packed sequences: q (total_q, nheads, headdim) over k and v (total_k, nheads_k, headdim).

    cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), contiguous, the cumulative lengths, read on the device.
    block_table: int32 (batch, max_num_blocks): k and v are then pages (num_blocks, page_block_size, nheads_k, headdim)
        of any size, as in `flash_attn_with_kvcache`, and sequence b has cu_seqlens_k[b + 1] - cu_seqlens_k[b] keys
        there. No gradients: inputs that require them raise NotImplementedError unless in torch.no_grad().

    Returns (total_q, nheads, headdim of v), or (out, softmax_lse, None) with the LSE float32 (nheads, total_q).
    Arguments, errors and guarantee: see the module.
    """
    check_tensors(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    _refuse(dropout_p, window_size, softcap, alibi_slopes)
    mask = _mask(causal)
    if block_table is None:
        starts = cu_seqlens_q, cu_seqlens_k
        result = attend(attention_varlen, q, k, v, *starts, mask, scale=softmax_scale, return_lse=return_attn_probs)
    else:
        _refuse_gradients(q, k, v)
        result = attention_kvcache(
            *(*readable(q), k, v, cu_seqlens_k.diff()),
            block_table=block_table.contiguous(),
            cu_seqlens_q=cu_seqlens_q,
            mask=mask,
            scale=softmax_scale,
            return_lse=return_attn_probs,
        )
    return _handed_back(result, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of keys and values in one tensor, kv: (total_k, 2, nheads_k, headdim)."""
    k, v = _parts("kv", kv, 4, 2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options)


def flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of one tensor, qkv: (total, 3, nheads, headdim), and one array of cumulative lengths."""
    q, k, v = _parts("qkv", qkv, 4, 3)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *options)


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of q (batch, seqlen_q, nheads, headdim) over caches, into which k and v are written first.

    k_cache, v_cache: (batch_cache, seqlen_cache, nheads_k, headdim); with ``block_table`` (num_blocks, page_block_size,
        nheads_k, headdim), pages of any size.
    k, v: (batch, seqlen_new, nheads_k, headdim), written in place behind the keys in the cache, which they then follow.
    cache_seqlens: int32 (batch,), contiguous, or an int for all: keys in the cache before the new ones. None: the cache
        is full; not together with k and v.
    cache_batch_idx: int32 (batch,): sequence b has the cache ``cache_batch_idx[b]``. No two with new keys may share
        one. Not together with ``block_table``.
    block_table: int32 (batch, max_num_blocks).
    causal: aligned bottom-right by the keys of each sequence, the new ones included.
    rotary_interleaved: not used without rotary_cos.
    num_splits: a scheduling hint, 0 for an automatic one. Every value gives the same bits.

    Returns (batch, seqlen_q, nheads, headdim of v), or (out, softmax_lse) with the LSE float32
    (batch, nheads, seqlen_q). No gradients are recorded. Arguments, errors and guarantee: see the module.
    """
    import torch

    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    _refuse(0.0, window_size, softcap, alibi_slopes)
    require_absent(rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_leftpad=cache_leftpad)
    if cache_batch_idx is not None:
        require(block_table is None, "cache_batch_idx", "a tensor beside block_table", "None")
        block_table = cache_batch_idx.unsqueeze(1)  # a cache of each sequence's own is a table of one page
    if block_table is not None:
        block_table = block_table.contiguous()
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens: got None beside k, expected the lengths that k is to be written behind")
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    q, k, v = readable(q, k, v)
    if k is not None and k.shape[1] != q.shape[1]:
        append_kv(k, v, k_cache, v_cache, cache_seqlens, block_table=block_table)
        cache_seqlens = cache_seqlens + k.shape[1]
        k = v = None
    return attention_kvcache(
        *(q, k_cache, v_cache, cache_seqlens),
        block_table=block_table,
        k_new=k,
        v_new=v,
        mask=_mask(causal),
        scale=softmax_scale,
        return_lse=return_softmax_lse,
        num_splits=num_splits or None,
    )


def _refuse(dropout_p: float, window_size: Window, softcap: float, alibi_slopes: Any) -> None:
    require(dropout_p == 0, "dropout_p", dropout_p, "0.0")
    require(tuple(window_size) == (-1, -1), "window_size", tuple(window_size), "(-1, -1)")
    require(softcap <= 0, "softcap", softcap, "0.0")
    require_absent(alibi_slopes=alibi_slopes)


def _refuse_gradients(*inputs: Any) -> None:
    import torch

    needed = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    require(not needed, "block_table", "pages beside a tensor that requires grad", "None or torch.no_grad()")


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"


def _parts(name: str, packed: Any, rank: int, parts: int) -> tuple[Any, ...]:
    """The tensors that lie side by side in the third dimension from the end."""
    check_tensors(**{name: packed})
    if packed.dim() != rank or packed.shape[-3] != parts:
        letters = f"({'batch, seqlen' if rank == 5 else 'total'}, {parts}, nheads, headdim)"
        raise ValueError(f"{name}: got shape {tuple(packed.shape)}, expected {letters}")
    return tuple(packed.unbind(-3))


def _handed_back(result: Any, return_attn_probs: bool) -> Any:
    return (*result, None) if return_attn_probs else result
