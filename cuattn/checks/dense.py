"""The arguments of `cuattn.attention` and `cuattn.attention_varlen`."""

from dataclasses import replace

from cuattn.checks.arrays import (
    LETTERS,
    Named,
    check_keys,
    check_memory,
    check_place,
    check_query,
    check_span,
    import_array,
)
from cuattn.checks.lengths import check_key_lengths, check_starts, import_numbers, import_starts
from cuattn.checks.options import check_layout, check_mask, check_optional_count, check_scale, is_checked
from cuattn.interop import Tensor, import_tensor
from cuattn.problem import PACKED, Problem, Sequences, in_kernel_axes


def check_attention(
    q: object,
    k: object,
    v: object,
    mask: str | None,
    scale: object,
    key_padding_mask: object,
    layout: str,
    num_splits: object,
    kv_lengths: object = None,
) -> Problem:
    """Checks the arguments of `cuattn.attention`, all but ``out``."""
    check_layout(layout)
    problem = _check_arrays(q, k, v, mask, scale, layout, num_splits)
    batch, first = problem.batch, Named("q", problem.query)
    if problem.key.shape[0] != batch:
        raise ValueError(f"k: got batch size {problem.key.shape[0]}, expected q's {batch}")
    if key_padding_mask is not None:
        if kv_lengths is not None:
            raise ValueError("key_padding_mask: got a mask beside kv_lengths, expected one of the two")
        shape = (batch, problem.key_length)
        check_span("k", problem.key, (2,))
        check_span("v", problem.value, (2,))
        return replace(problem, key_padding_mask=_check_padding(key_padding_mask, first, shape))
    if kv_lengths is None:
        return problem
    lengths = import_numbers("kv_lengths", kv_lengths, first)
    if lengths.shape != (batch,):
        raise ValueError(f"kv_lengths: got shape {lengths.shape}, expected (batch,) {(batch,)}")
    check_key_lengths(lengths, problem.key_length, is_checked())
    return replace(problem, sequences=Sequences(batch, key_lengths=lengths))


def check_varlen(
    q: object,
    k: object,
    v: object,
    cu_seqlens_q: object,
    cu_seqlens_k: object,
    mask: str | None,
    max_seqlen_q: object,
    max_seqlen_k: object,
    scale: object,
    num_splits: object,
) -> Problem:
    """Checks the arguments of `cuattn.attention_varlen`, all but ``out``."""
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        check_optional_count(name, bound, 0)
    problem = _check_arrays(q, k, v, mask, scale, PACKED, num_splits)
    first, checked = Named("q", problem.query), is_checked()
    query_starts = import_starts("cu_seqlens_q", cu_seqlens_q, first, problem.query_length)
    key_starts = import_starts("cu_seqlens_k", cu_seqlens_k, first, problem.key_length)
    check_starts("cu_seqlens_q", query_starts, problem.query_length, checked)
    check_starts("cu_seqlens_k", key_starts, problem.key_length, checked)
    if key_starts.shape != query_starts.shape:
        raise ValueError(f"cu_seqlens_k: got shape {key_starts.shape}, expected cu_seqlens_q's {query_starts.shape}")
    return replace(problem, sequences=Sequences(query_starts.shape[0] - 1, query_starts, key_starts))


def _check_arrays(
    q: object, k: object, v: object, mask: str | None, scale: object, layout: str, num_splits: object
) -> Problem:
    """What both have in common."""
    mask, splits = check_mask(mask), check_optional_count("num_splits", num_splits, 1)
    query = import_array("q", q, LETTERS[layout])
    first = Named("q", query)
    key, value = (
        Named(name, in_kernel_axes(import_array(name, array, LETTERS[layout], first), layout))
        for name, array in (("k", k), ("v", v))
    )
    query = in_kernel_axes(query, layout)
    check_query(query, key, value)
    check_keys(key, value)
    for name, tensor in (("q", query), key, value):
        check_memory(name, tensor)
    return Problem(query, key.tensor, value.tensor, mask, check_scale(scale, query.shape[3]), layout, num_splits=splits)


def _check_padding(key_padding_mask: object, first: Named, shape: tuple[int, int]) -> Tensor:
    mask = import_tensor(key_padding_mask, "key_padding_mask")
    if mask.dtype != "bool":
        raise TypeError(f"key_padding_mask: got dtype {mask.dtype}, expected bool")
    check_place("key_padding_mask", mask, first)
    if mask.shape != shape:
        raise ValueError(f"key_padding_mask: got shape {mask.shape}, expected (batch, k's length) {shape}")
    return mask
