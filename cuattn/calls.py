"""What the public functions compute where no library has to see an operator: anew, or as for an earlier like call."""

from functools import partial
from typing import Any

from cuattn import dispatch, replay
from cuattn.checks import check_attention, check_kvcache, check_upstream, check_varlen, output_of
from cuattn.interop import Tensor
from cuattn.problem import Append, Sequences
from cuattn.results import attend, differentiate, fill

GRADIENTS = ("dq", "dk", "dv")
#: By whether the LSE is returned.
RESULTS = (("out",), ("out", "lse"))


def attention(
    q: Any,
    k: Any,
    v: Any,
    mask: str | None,
    scale: float | None,
    key_padding_mask: Any,
    layout: str,
    num_splits: int | None,
    kv_lengths: Any,
    out: Any,
    return_lse: bool,
) -> Any:
    inputs = (q, k, v, mask, scale, key_padding_mask, layout, num_splits, kv_lengths)

    def make() -> Any:
        return attend(check_attention(*inputs), out, return_lse)

    if out is not None:
        return make()
    both = bool(return_lse)
    options = ("attention", mask, scale, layout, num_splits, both)
    return replay.call(options, (q, k, v, key_padding_mask, kv_lengths), RESULTS[both], make)


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    mask: str | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scale: float | None,
    num_splits: int | None,
    out: Any,
    return_lse: bool,
) -> Any:
    arrays = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    others = (mask, max_seqlen_q, max_seqlen_k, scale, num_splits)

    def make() -> Any:
        return attend(check_varlen(*arrays, *others), out, return_lse)

    if out is not None:
        return make()
    both = bool(return_lse)
    return replay.call(("attention_varlen", *others, both), arrays, RESULTS[both], make)


def attention_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    cache_lengths: Any,
    block_table: Any,
    k_new: Any,
    v_new: Any,
    cu_seqlens_q: Any,
    mask: str | None,
    scale: float | None,
    num_splits: int | None,
    layout: str,
    check: bool | None,
    out: Any,
    return_lse: bool,
) -> Any:
    arrays = (q, k_cache, v_cache, cache_lengths, block_table, k_new, v_new, cu_seqlens_q)
    appends = k_new is not None

    def make() -> Any:
        problem = check_kvcache(*arrays, mask, scale, num_splits, layout, check)
        result = fill(output_of(problem, "k_cache", "v_cache"), partial(dispatch.execute, problem), out, return_lse)
        if problem.append is not None and problem.sequences is not None:
            if problem.query_heads == 0:  # nothing attends, so nothing has been written yet
                append(problem.append, problem.sequences, problem.key, problem.value)
            else:
                _written(problem.key, problem.value)
        return result

    if out is not None or check:
        return make()
    both = bool(return_lse)
    options = ("attention_kvcache", mask, scale, num_splits, layout, check, both)
    return replay.call(options, arrays, RESULTS[both], make, updates=(1, 2) if appends else ())


def append(new: Append, sequences: Sequences, key: Tensor, value: Tensor) -> None:
    """New keys and values into a cache."""
    if 0 not in new.key.shape:
        dispatch.execute_append(new, sequences, key, value)
    _written(key, value)


def _written(*caches: Tensor) -> None:
    for cache in caches:
        cache.framework.written(cache)


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dlse: Any,
    mask: str | None,
    scale: float | None,
    key_padding_mask: Any,
    layout: str,
    kv_lengths: Any,
) -> tuple[Any, Any, Any]:
    def make() -> Any:
        problem = check_attention(q, k, v, mask, scale, key_padding_mask, layout, None, kv_lengths)
        return differentiate(problem, check_upstream(problem, dout, out, lse, dlse))

    arrays = (q, k, v, dout, out, lse, dlse, key_padding_mask, kv_lengths)
    dq, dk, dv = replay.call(("attention_backward", mask, scale, layout), arrays, GRADIENTS, make)
    return dq, dk, dv


def attention_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dlse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    mask: str | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scale: float | None,
) -> tuple[Any, Any, Any]:
    starts, bounds = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)

    def make() -> Any:
        problem = check_varlen(q, k, v, *starts, mask, *bounds, scale, None)
        return differentiate(problem, check_upstream(problem, dout, out, lse, dlse))

    options = ("attention_varlen_backward", mask, *bounds, scale)
    dq, dk, dv = replay.call(options, (q, k, v, dout, out, lse, dlse, *starts), GRADIENTS, make)
    return dq, dk, dv
