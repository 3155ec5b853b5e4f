"""The invariance checks of sequences of different lengths: padded, packed, in caches, and cut into shards."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cuattn.reference.gold import visible_keys
from cuattn.testing.arrays import bool_array, int32_array, poison
from cuattn.testing.inputs import Case, Inputs
from cuattn.testing.invariance import with_visible_keys
from cuattn.testing.subject import BaseSubject, Cache, R, Result, Subject

Exists = NDArray[np.bool_]  # (B, Lk)
#: Keys per page.
PAGE_SIZES = (16, 1)
SHARDS = (1, 2, 3)


def key_lengths(subject: Subject) -> None:
    """The last keys of every sequence, of each another number, turned into NaN that kv_lengths cuts off."""
    lengths = key_counts(subject.case)
    exists = np.arange(subject.case.len_k) < np.array(lengths)[:, None]
    result = subject.run(_only(subject.inputs, exists), kv_lengths=int32_array(subject.library, lengths))
    _assert_existing_keys(subject, result, exists, "kv_lengths")


def key_padding(subject: Subject) -> None:
    """Keys turned into NaN that key_padding_mask takes out: behind every sequence, before it, and inside of it."""
    for name, exists in padding_masks(subject.case).items():
        mask = bool_array(subject.library, exists)
        result = subject.run(_only(subject.inputs, exists), key_padding_mask=mask)
        _assert_existing_keys(subject, result, exists, f"padding {name}")


def padding_masks(case: Case) -> dict[str, Exists]:
    """Which keys exist, for padding on the right, on the left, and with holes."""
    lengths, place = np.array(key_counts(case))[:, None], np.arange(case.len_k)
    missing, middle = case.len_k - lengths, case.len_k // 2
    return {
        "right": place < lengths,
        "left": place >= missing,
        "holes": (place != 1) & ~((middle <= place) & (place < middle + missing)),
    }


def key_counts(case: Case) -> list[int]:
    """Keys of each sequence, not more than ``len_k``."""
    return list(case.lengths or (max(0, case.len_k - 3 * (item + 1)) for item in range(case.batch)))


def _only(inputs: Inputs, exists: Exists) -> Inputs:
    """NaN in the place of all other keys and values."""
    nan = poison((), inputs.k.itemsize)
    k, v = (np.where(exists[:, None, :, None], bits, nan) for bits in (inputs.k, inputs.v))
    return replace(inputs, k=k, v=v)


def _assert_existing_keys(subject: Subject, result: Result, exists: Exists, name: str) -> None:
    """The rows of each sequence alone with its existing keys one behind the other."""
    case = subject.case
    for item in range(case.batch):
        alone = subject.inputs.items([item]).keys(np.flatnonzero(exists[item]))
        # the causal diagonal stays where the keys that do not exist are still counted
        seen = np.concatenate([[0], exists[item].cumsum()])[visible_keys(case.len_q, case.len_k, case.mask)]
        for mask, first, last in spans(seen):
            expected = subject.run(alone.with_keys(seen[last - 1]).with_rows(first, last), mask=mask)
            got = result[item : item + 1, :, first:last]
            got.assert_equals(expected, f"{name}, rows {first} to {last} of sequence {item}")


def spans(seen: NDArray[np.integer]) -> Iterator[tuple[str, int, int]]:
    """(mask, first row, last row + 1) of rows that see one key more each ("causal") or all the same ("full").

    ``seen`` is how many keys each row sees, ascending by 0 or 1.
    """
    first = 0
    while first < len(seen):
        step = seen[first + 1] - seen[first] if first + 1 < len(seen) else 0
        last = first + 1
        while last < len(seen) and seen[last] - seen[last - 1] == step:
            last += 1
        yield ("causal" if step else "full"), first, last
        first = last


def packed_sequences(subject: Subject) -> None:
    """The batch packed, of lengths that differ, with a sequence of NaN at both ends and empty ones between."""
    sequences = different_lengths(subject.inputs, subject.case)
    for item, result in enumerate(run_packed_among_nan(subject, sequences)):
        expected = subject.baseline[item : item + 1, :, : sequences[item].q.shape[2]]
        result.assert_equals(expected, f"sequence {item}, packed")


def different_lengths(inputs: Inputs, case: Case) -> list[Inputs]:
    """Each sequence alone: its first rows and the keys that they see."""
    rows = case.lengths or [max(1, case.len_q - 5 * item) for item in range(case.batch)]
    return [with_visible_keys(inputs.items([item]), case, count).with_rows(0, count) for item, count in enumerate(rows)]


def run_packed_among_nan(subject: BaseSubject[R], sequences: Sequence[Inputs]) -> list[R]:
    """The results of sequences packed behind empty ones, with a sequence of NaN at both ends."""
    nan = subject.inputs.items([0]).each(lambda bits: poison(bits.shape, bits.itemsize))
    nothing = nan.with_rows(0, 0).with_keys(0)
    among = [one for sequence in sequences for one in (nothing, sequence)]
    return subject.run_packed([nan, *among, nothing, nan])[2:-2:2]


def contiguous_cache(subject: Subject) -> None:
    """Rows appended to a cache in pieces, the last one by one, against all of them at once."""
    _check_cache(subject, None)


def paged_cache(subject: Subject) -> None:
    """The same in shuffled pages."""
    for page_size in PAGE_SIZES:
        _check_cache(subject, page_size)


def _check_cache(subject: Subject, page_size: int | None) -> None:
    """Unwritten places hold NaN, and every sequence has another number of keys at first."""
    inputs, case = subject.inputs, subject.case
    starts = [max(0, case.len_k - case.len_q - 3 * item) for item in range(case.batch)]
    cache = Cache.of(subject.library, case.dtype, inputs, starts, page_size)
    name = "cache" if page_size is None else f"pages of {page_size}"
    for first, last in pairwise(sorted({0, case.len_q // 2, case.len_q - 1, case.len_q})):
        places = np.array(starts)[:, None] + np.arange(first, last)
        k, v = (np.take_along_axis(bits, places[:, None, :, None], axis=2) for bits in (inputs.k, inputs.v))
        result = subject.run_cached(cache, Inputs(inputs.q[:, :, first:last], k, v))
        for item, start in enumerate(starts):
            alone = subject.run(inputs.items([item]).with_keys(start + last).with_rows(0, last))
            expected = alone[:, :, first:last]
            result[item : item + 1].assert_equals(expected, f"{name}, rows {first} to {last} of sequence {item}")


def key_shards(subject: Subject) -> None:
    """The keys cut into parts, which are computed on their own and merged."""
    for shards in SHARDS:
        result = subject.run(subject.inputs, shards=shards)
        result.assert_equals(subject.baseline, f"{shards} shards")
