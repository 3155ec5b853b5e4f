"""The arguments of `cuattn.attention_kvcache` and `cuattn.append_kv`."""

from dataclasses import dataclass, replace

from cuattn.checks.arrays import (
    LARGEST_DIM,
    LETTERS,
    PAGED_LETTERS,
    Named,
    check_keys,
    check_memory,
    check_query,
    check_span,
    check_written,
    import_array,
)
from cuattn.checks.lengths import check_cache_numbers, check_starts, import_numbers, import_starts
from cuattn.checks.options import check_layout, check_mask, check_optional_count, check_scale, is_checked
from cuattn.interop import Tensor
from cuattn.problem import PACKED, Append, Problem, Sequences, caller_shape, in_kernel_axes


@dataclass(frozen=True)
class AppendCall:
    """A checked call of `cuattn.append_kv`: new keys and values, and the caches in kernel axes."""

    append: Append
    sequences: Sequences
    key: Tensor
    value: Tensor


def check_kvcache(
    q: object,
    k_cache: object,
    v_cache: object,
    cache_lengths: object,
    block_table: object,
    k_new: object,
    v_new: object,
    cu_seqlens_q: object,
    mask: str | None,
    scale: object,
    num_splits: object,
    layout: str,
    check: object,
) -> Problem:
    """Checks the arguments of `cuattn.attention_kvcache`, all but ``out``."""
    mask, splits = check_mask(mask), check_optional_count("num_splits", num_splits, 1)
    row_layout = _check_row_layout(layout, "cu_seqlens_q", cu_seqlens_q)
    query = import_array("q", q, LETTERS[row_layout])
    first = Named("q", query)
    key, value = _import_caches(k_cache, v_cache, block_table, layout, first)
    query = in_kernel_axes(query, row_layout)
    check_query(query, key, value)
    check_memory("q", query)
    sequences = _import_sequences(
        first, query, key, cache_lengths, block_table, "cu_seqlens_q", cu_seqlens_q, k_new is not None
    )
    append = None
    if (k_new is None) != (v_new is None):
        missing, given = ("v_new", "k_new") if v_new is None else ("k_new", "v_new")
        raise ValueError(f"{missing}: got None beside {given}, expected both or none")
    if k_new is not None:
        new = [
            in_kernel_axes(import_array(name, array, LETTERS[row_layout], first), row_layout)
            for name, array in (("k_new", k_new), ("v_new", v_new))
        ]
        append = Append(*new)
        _check_append(append, key, value, query.shape[0], query.shape[2], row_layout)
        _check_writing(append, key, value, {"q": query})
    _check_numbers(sequences, query.shape[2], key.tensor, "cu_seqlens_q", is_checked(check))
    return Problem(
        query,
        key.tensor,
        value.tensor,
        mask,
        check_scale(scale, query.shape[3]),
        row_layout,
        sequences,
        append=append,
        num_splits=splits,
    )


def check_append(
    k_new: object,
    v_new: object,
    k_cache: object,
    v_cache: object,
    cache_lengths: object,
    block_table: object,
    cu_seqlens: object,
    layout: str,
    check: object,
) -> AppendCall:
    """Checks the arguments of `cuattn.append_kv`."""
    row_layout = _check_row_layout(layout, "cu_seqlens", cu_seqlens)
    new_key = import_array("k_new", k_new, LETTERS[row_layout])
    first = Named("k_new", new_key)
    new_value = import_array("v_new", v_new, LETTERS[row_layout], first)
    append = Append(*(in_kernel_axes(x, row_layout) for x in (new_key, new_value)))
    key, value = _import_caches(k_cache, v_cache, block_table, layout, first)
    _check_append(append, key, value, append.key.shape[0], append.key.shape[2], row_layout)
    sequences = _import_sequences(first, append.key, key, cache_lengths, block_table, "cu_seqlens", cu_seqlens, True)
    _check_writing(append, key, value, {})
    _check_numbers(sequences, append.key.shape[2], key.tensor, "cu_seqlens", is_checked(check))
    return AppendCall(append, sequences, key.tensor, value.tensor)


def _check_row_layout(layout: str, name: str, starts: object) -> str:
    """The layout of queries and new keys: packed beside cumulative lengths, where the cache has tokens before heads."""
    check_layout(layout)
    if starts is None:
        return layout
    if layout != "bshd":
        raise ValueError(f"layout: got {layout!r} beside {name}, expected 'bshd'")
    return PACKED


def _import_caches(
    k_cache: object, v_cache: object, block_table: object, layout: str, first: Named
) -> tuple[Named, Named]:
    """Both caches, in kernel axes."""
    letters = (LETTERS if block_table is None else PAGED_LETTERS)[layout]
    key, value = (
        Named(name, in_kernel_axes(import_array(name, array, letters, first), layout))
        for name, array in (("k_cache", k_cache), ("v_cache", v_cache))
    )
    check_keys(key, value)
    for name, tensor in (key, value):
        check_memory(name, tensor)
        if block_table is not None:
            check_span(name, tensor, (0, 2))
    return key, value


def _import_sequences(
    first: Named,
    rows: Tensor,
    key: Named,
    cache_lengths: object,
    block_table: object,
    starts_name: str,
    starts: object,
    new_keys: bool,
) -> Sequences:
    """Lengths and pages for queries or new keys, in kernel axes."""
    query_starts = None
    count = rows.shape[0]
    if starts is not None:
        query_starts = import_starts(starts_name, starts, first, rows.shape[2])
        count = query_starts.shape[0] - 1
    lengths = import_numbers("cache_lengths", cache_lengths, first)
    if lengths.shape != (count,):
        raise ValueError(f"cache_lengths: got shape {lengths.shape}, expected (sequences,) {(count,)}")
    sequences = Sequences(count, query_starts, key_lengths=lengths, cached=True, new_keys=new_keys)
    if block_table is None:
        if key.tensor.shape[0] != count:
            raise ValueError(f"{key.name}: got batch size {key.tensor.shape[0]}, expected {count}")
        return sequences
    table = import_numbers("block_table", block_table, first, 2)
    if table.shape[0] != count:
        raise ValueError(f"block_table: got shape {table.shape}, expected (sequences, pages) ({count}, ...)")
    page_size = key.tensor.shape[2]
    if page_size == 0:
        raise ValueError(f"{key.name}: got page size 0, expected at least 1")
    if table.shape[1] * page_size > LARGEST_DIM:
        raise ValueError(
            f"block_table: got {table.shape[1]} pages of {page_size} keys, expected at most {LARGEST_DIM} keys"
        )
    return replace(sequences, block_table=table)


def _check_append(append: Append, key: Named, value: Named, batch: int, length: int, layout: str) -> None:
    """New keys and values, in kernel axes: one for every row, of the caches' heads."""
    for name, new, cache in (("k_new", append.key, key), ("v_new", append.value, value)):
        _, heads, _, columns = cache.tensor.shape
        expected = (batch, heads, length, columns)
        if new.shape != expected:
            got, wanted = (caller_shape(shape, layout) for shape in (new.shape, expected))
            raise ValueError(f"{name}: got shape {got}, expected {wanted}")
        check_memory(name, new)


def _check_writing(append: Append, key: Named, value: Named, read: dict[str, Tensor]) -> None:
    """Caches that can take new keys and values."""
    read = read | {"k_new": append.key, "v_new": append.value}
    check_written(key.name, key.tensor, read)
    check_written(value.name, value.tensor, read | {key.name: key.tensor})


def _check_numbers(sequences: Sequences, rows: int, cache: Tensor, starts_name: str, checked: bool) -> None:
    if sequences.query_starts is not None:
        check_starts(starts_name, sequences.query_starts, rows, checked)
    check_cache_numbers(sequences, rows, cache, checked)
