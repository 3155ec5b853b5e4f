"""All invariance checks, each with its negative control: an operation that does depend on the one thing the check
varies, and on nothing else, and that therefore must fail it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cuattn.testing import gradient_invariance, invariance, seen, sequences
from cuattn.testing.controls import depends_on, leaves_a_sequence_unwritten
from cuattn.testing.gradient_controls import gradients_depend_on
from cuattn.testing.inputs import Case
from cuattn.testing.subject import Operation


def _always(case: Case) -> bool:
    return True


@dataclass(frozen=True)
class Check:
    """One way in which bits could change.

    run raises AssertionError if they do; control makes an operation fail it; applies says for which cases it means
    anything; keyword is the keyword of the operation without which it cannot run.
    """

    name: str
    run: Callable[[Any], None]  # of a subject
    control: Callable[[Operation], Operation]
    applies: Callable[[Case], bool] = _always
    keyword: str | None = None


def _many_sequences(case: Case) -> bool:
    return case.batch > 1


def _many_rows(case: Case) -> bool:
    return case.len_q > 1


def _hides_keys(case: Case) -> bool:
    return case.mask == "causal" and case.len_q > 1


def _grouped(case: Case) -> bool:
    return case.heads > case.kv_heads


def _many_key_heads(case: Case) -> bool:
    return case.kv_heads > 1


def _key_for_each_row(case: Case) -> bool:
    return case.len_k >= case.len_q


CHECKS = (
    Check("batch size", invariance.batch_size, depends_on(seen.batch_size), _many_sequences),
    Check("batch position", invariance.batch_position, depends_on(seen.position), _many_sequences),
    Check("permutation", invariance.permutation, depends_on(seen.position), _many_sequences),
    Check("neighbours", invariance.neighbours, depends_on(seen.garbage)),
    Check("chunked prefill", invariance.chunked_prefill, depends_on(seen.rows), _many_rows),
    Check("decode against prefill", invariance.decode, depends_on(seen.rows), _many_rows),
    Check("mask type", invariance.mask_type, depends_on(seen.mask)),
    Check("repeated key heads", invariance.repeated_heads, depends_on(seen.key_heads), _grouped),
    Check("head slices", invariance.head_slices, depends_on(seen.heads), _many_key_heads),
    Check("strides", invariance.strides, depends_on(seen.strides)),
    Check("memory order", invariance.memory_order, depends_on(seen.strides)),
    Check("layout", invariance.layout, depends_on(seen.layout), keyword="layout"),
    Check("repeated runs", invariance.repeated_runs, depends_on(seen.runs)),
    Check("unseen keys", invariance.unseen_keys, depends_on(seen.last_key), _hides_keys),
    Check("other rows", invariance.other_rows, depends_on(seen.garbage), _many_rows),
    Check("num_splits", invariance.split_hint, depends_on(seen.splits), keyword="num_splits"),
    Check("given output", invariance.given_output, leaves_a_sequence_unwritten, keyword="out"),
    Check("key lengths", sequences.key_lengths, depends_on(seen.padding), keyword="kv_lengths"),
    Check("key padding", sequences.key_padding, depends_on(seen.padding), keyword="key_padding_mask"),
    Check("packed sequences", sequences.packed_sequences, depends_on(seen.first_key), keyword="cu_seqlens_q"),
    Check("contiguous cache", sequences.contiguous_cache, depends_on(seen.padding), _key_for_each_row, "cache_lengths"),
    Check("paged cache", sequences.paged_cache, depends_on(seen.first_key), _key_for_each_row, "block_table"),
    Check("key shards", sequences.key_shards, depends_on(seen.shards), keyword="shards"),
)

#: Those of gradients.
GRADIENT_CHECKS = tuple(
    Check(f"gradients: {name}", run, gradients_depend_on(number), applies, keyword)
    for name, run, number, applies, keyword in (
        ("sequences alone", gradient_invariance.sequences_alone, seen.batch_size, _many_sequences, None),
        ("batch size", invariance.batch_size, seen.batch_size, _many_sequences, None),
        ("batch position", invariance.batch_position, seen.position, _many_sequences, None),
        ("permutation", invariance.permutation, seen.position, _many_sequences, None),
        ("neighbours", invariance.neighbours, seen.garbage, _always, None),
        ("rows left out", gradient_invariance.rows_left_out, seen.rows, _many_rows, None),
        ("mask type", gradient_invariance.mask_type, seen.mask, _always, None),
        ("repeated key heads", gradient_invariance.repeated_heads, seen.key_heads, _grouped, None),
        ("head slices", invariance.head_slices, seen.heads, _many_key_heads, None),
        ("strides", invariance.strides, seen.strides, _always, None),
        ("memory order", invariance.memory_order, seen.strides, _always, None),
        ("layout", invariance.layout, seen.layout, _always, "layout"),
        ("repeated runs", invariance.repeated_runs, seen.runs, _always, None),
        ("unseen keys", gradient_invariance.unseen_keys, seen.last_key, _hides_keys, None),
        ("key lengths", gradient_invariance.key_lengths, seen.padding, _always, "kv_lengths"),
        ("key padding", gradient_invariance.key_padding, seen.padding, _always, "key_padding_mask"),
        ("packed sequences", gradient_invariance.packed_sequences, seen.first_key, _always, "cu_seqlens_q"),
    )
)
