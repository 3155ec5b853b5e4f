"""All invariance checks, each with its negative control: an operation that does depend on the one thing the check
varies, and on nothing else, and that therefore must fail it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cuattn.testing import controls, invariance, sequences
from cuattn.testing.inputs import Case
from cuattn.testing.subject import Operation, Subject


@dataclass(frozen=True)
class Check:
    """One way in which bits could change.

    run raises AssertionError if they do; control makes an operation fail it; applies says for which cases it means
    anything; keyword is the keyword of the operation without which it cannot run.
    """

    name: str
    run: Callable[[Subject], None]
    control: Callable[[Operation], Operation]
    applies: Callable[[Case], bool] = lambda case: True
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
    Check("batch size", invariance.batch_size, controls.depends_on_batch_size, _many_sequences),
    Check("batch position", invariance.batch_position, controls.depends_on_position, _many_sequences),
    Check("permutation", invariance.permutation, controls.depends_on_position, _many_sequences),
    Check("neighbours", invariance.neighbours, controls.depends_on_garbage),
    Check("chunked prefill", invariance.chunked_prefill, controls.depends_on_rows, _many_rows),
    Check("decode against prefill", invariance.decode, controls.depends_on_rows, _many_rows),
    Check("mask type", invariance.mask_type, controls.depends_on_mask),
    Check("repeated key heads", invariance.repeated_heads, controls.depends_on_key_heads, _grouped),
    Check("head slices", invariance.head_slices, controls.depends_on_heads, _many_key_heads),
    Check("strides", invariance.strides, controls.depends_on_strides),
    Check("memory order", invariance.memory_order, controls.depends_on_strides),
    Check("layout", invariance.layout, controls.depends_on_layout, keyword="layout"),
    Check("repeated runs", invariance.repeated_runs, controls.depends_on_runs),
    Check("unseen keys", invariance.unseen_keys, controls.depends_on_last_key, _hides_keys),
    Check("other rows", invariance.other_rows, controls.depends_on_garbage, _many_rows),
    Check("num_splits", invariance.split_hint, controls.depends_on_splits, keyword="num_splits"),
    Check("given output", invariance.given_output, controls.leaves_a_sequence_unwritten, keyword="out"),
    Check("key lengths", sequences.key_lengths, controls.depends_on_padding, keyword="kv_lengths"),
    Check("key padding", sequences.key_padding, controls.depends_on_padding, keyword="key_padding_mask"),
    Check("packed sequences", sequences.packed_sequences, controls.depends_on_first_key, keyword="cu_seqlens_q"),
    Check(
        "contiguous cache", sequences.contiguous_cache, controls.depends_on_padding, _key_for_each_row, "cache_lengths"
    ),
    Check("paged cache", sequences.paged_cache, controls.depends_on_first_key, _key_for_each_row, "block_table"),
    Check("key shards", sequences.key_shards, controls.depends_on_shards, keyword="shards"),
)
