"""The invariance checks of batches of equal lengths: each compares raw bits of two ways to compute the same rows."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np

from cuattn.testing.arrays import Bits, poison, raw_bits, round_to_bits
from cuattn.testing.inputs import Case, Inputs
from cuattn.testing.subject import BaseSubject, R, Subject, contiguous, padded, rows_first


def batch_size(subject: BaseSubject[R]) -> None:
    """A sequence alone, with the first others, and in a doubled batch."""
    inputs, baseline = subject.inputs, subject.baseline
    batch = len(inputs.q)
    for size in sorted({1, batch - 1}):
        subject.run(inputs.items(slice(size))).assert_equals(baseline[:size], f"batch {size} against {batch}")
    doubled = subject.run(inputs.items(list(range(batch)) * 2))
    doubled[batch:].assert_equals(baseline, f"batch {2 * batch} against {batch}")


def batch_position(subject: BaseSubject[R]) -> None:
    """One sequence at every place of the batch."""
    inputs, baseline = subject.inputs, subject.baseline
    batch = len(inputs.q)
    copies = subject.run(inputs.items([0] * batch))
    for place in range(batch):
        copies[place : place + 1].assert_equals(baseline[:1], f"place {place} of {batch} against place 0")


def permutation(subject: BaseSubject[R]) -> None:
    """The batch in the reverse order."""
    order = list(range(subject.case.batch))[::-1]
    subject.run(subject.inputs.items(order)).assert_equals(subject.baseline[order], "reversed batch")


def neighbours(subject: BaseSubject[R]) -> None:
    """Sequences of NaN before and behind."""

    def surrounded(bits: Bits) -> Bits:
        nan = poison(bits[:1].shape, bits.itemsize)
        return np.concatenate([nan, bits[:1], nan])

    result = subject.run(subject.inputs.each(surrounded))
    result[1:2].assert_equals(subject.baseline[:1], "between sequences of NaN")


def chunked_prefill(subject: Subject) -> None:
    """The query rows in pieces, at several sets of boundaries; causal pieces get the keys up to their last row."""
    inputs, baseline = subject.inputs.items(slice(1)), subject.baseline
    for cuts in boundaries(subject.case.len_q):
        for first, last in pairwise(cuts):
            piece = with_visible_keys(inputs, subject.case, last).with_rows(first, last)
            subject.run(piece).assert_equals(baseline[:1, :, first:last], f"rows {first} to {last} of {cuts}")


def boundaries(length: int) -> Iterator[list[int]]:
    """Sets of cuts of ``length`` rows: off by one at both ends, unequal pieces, and pieces of about a power of two."""
    sets = [[1, length // 3 + 1, length - 1], [length // 2]]
    piece = 1 << max(length // 4, 1).bit_length()  # 4 pieces or fewer
    sets.append(list(range(piece, length, piece)))
    seen: list[list[int]] = []
    for inner in sets:
        cuts = [0, *sorted({cut for cut in inner if 0 < cut < length}), length]
        if len(cuts) > 2 and cuts not in seen:
            seen.append(cuts)
            yield cuts


def with_visible_keys(inputs: Inputs, case: Case, rows: int) -> Inputs:
    """The keys that any of the first ``rows`` query rows sees."""
    if case.mask == "full":
        return inputs
    return inputs.with_keys(max(0, case.len_k - case.len_q + rows))


def decode(subject: Subject) -> None:
    """Single query rows, each with the keys it sees: first, last, and around tile edges."""
    inputs, baseline = subject.inputs.items(slice(1)), subject.baseline
    length = subject.case.len_q
    for row in sorted({0, 15, 16, 63, 127, 128, length // 2, length - 2, length - 1}):
        if 0 <= row < length:
            one = with_visible_keys(inputs, subject.case, row + 1).with_rows(row, row + 1)
            subject.run(one).assert_equals(baseline[:1, :, row : row + 1], f"row {row} alone")


def mask_type(subject: Subject) -> None:
    """The last query row sees every key under either mask."""
    other = "full" if subject.case.mask == "causal" else "causal"
    length = subject.case.len_q
    last = subject.run(subject.inputs.with_rows(length - 1, length), mask=other)
    last.assert_equals(subject.baseline[:, :, -1:], f"last row, {other} against {subject.case.mask}")


def repeated_heads(subject: Subject) -> None:
    """Grouped heads against the same keys and values repeated for every query head."""
    inputs, group = subject.inputs, subject.case.heads // subject.case.kv_heads
    repeated = replace(inputs, k=np.repeat(inputs.k, group, axis=1), v=np.repeat(inputs.v, group, axis=1))
    subject.run(repeated).assert_equals(subject.baseline, "repeated key heads")


def head_slices(subject: BaseSubject[R]) -> None:
    """Every key head with its group of query heads, alone."""
    group = subject.case.heads // subject.case.kv_heads
    for head in range(subject.case.kv_heads):
        alone = subject.run(subject.inputs.key_head(head))
        alone.assert_equals(subject.baseline.key_head(head, group), f"key head {head} alone")


def strides(subject: BaseSubject[R]) -> None:
    """Views into larger arrays with NaN in the gaps."""
    subject.run(subject.inputs, place=padded).assert_equals(subject.baseline, "padded views")


def memory_order(subject: BaseSubject[R]) -> None:
    """Views of memory in the order (B, L, H, D)."""
    subject.run(subject.inputs, place=rows_first).assert_equals(subject.baseline, "(B, L, H, D) memory")


def layout(subject: BaseSubject[R]) -> None:
    """layout="bshd" against "bhsd"."""
    result = subject.run(subject.inputs, place=rows_first, layout="bshd")
    result.assert_equals(subject.baseline, 'layout="bshd"')


def repeated_runs(subject: BaseSubject[R]) -> None:
    """The same call again and again."""
    for run in range(2, subject.runs + 1):
        subject.run(subject.inputs).assert_equals(subject.baseline, f"run {run} against run 1")


def unseen_keys(subject: Subject) -> None:
    """Other contents of keys and values that the earlier rows cannot see."""
    inputs, case = subject.inputs, subject.case
    hidden = max(1, min(case.len_q, case.len_k) // 2)
    k, v = inputs.k.copy(), inputs.v.copy()
    k[:, :, -hidden:] = v[:, :, -hidden:] = round_to_bits(np.array([3], np.float32), case.dtype)
    result = subject.run(replace(inputs, k=k, v=v))
    rows = np.s_[:, :, : case.len_q - hidden]
    result[rows].assert_equals(subject.baseline[rows], f"the last {hidden} keys replaced")


def other_rows(subject: Subject) -> None:
    """Query rows among rows of NaN."""
    q = poison(subject.inputs.q.shape, subject.inputs.q.itemsize)
    kept = np.s_[:, :, ::3]
    q[kept] = subject.inputs.q[kept]
    result = subject.run(replace(subject.inputs, q=q))
    result[kept].assert_equals(subject.baseline[kept], "every third row, NaN in the others")


def split_hint(subject: Subject) -> None:
    """Values of num_splits, for all rows and for the last one alone, as in decode."""
    inputs, length = subject.inputs, subject.case.len_q
    for first, values in ((0, (1, 3, 64)), (length - 1, (None, 1, 2, 7, 64))):
        for splits in values:
            result = subject.run(inputs.with_rows(first, length), num_splits=splits)
            result.assert_equals(subject.baseline[:, :, first:], f"rows from {first} on, num_splits={splits}")


def given_output(subject: Subject) -> None:
    """A caller's output array full of NaN, of which every element must be written."""
    bits = poison(subject.baseline.out.shape, subject.inputs.q.itemsize)
    out = contiguous(subject.library, bits, subject.case.dtype)
    result = subject.run(subject.inputs, out=out)
    result.assert_equals(subject.baseline, "out=")
    replace(result, out=raw_bits(out)[0]).assert_equals(subject.baseline, "the array given as out")
