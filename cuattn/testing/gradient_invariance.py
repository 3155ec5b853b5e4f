"""The invariance checks that gradients alone have, or have in another form: each compares raw bits."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.reference.gold import visible_keys
from cuattn.testing.arrays import Bits, bool_array, int32_array, poison, round_to_bits
from cuattn.testing.bitwise import assert_same_bits
from cuattn.testing.gradients import Gradients, GradientSubject
from cuattn.testing.inputs import Inputs
from cuattn.testing.invariance import with_visible_keys
from cuattn.testing.sequences import different_lengths, key_counts, padding_masks, run_packed_among_nan, spans
from cuattn.testing.subject import CUMULATIVE, accepts

Which = NDArray[np.bool_]  # (B, Lq) rows or (B, Lk) keys
#: What stands where a row is left out; all other arrays hold NaN there.
_ZERO = ("dout", "dlse")


def sequences_alone(subject: GradientSubject) -> None:
    """Every sequence of the batch in a call of its own."""
    batch = subject.case.batch
    for item in range(batch):
        alone = subject.run(subject.inputs.items([item]))
        alone.assert_equals(subject.baseline[item : item + 1], f"sequence {item} alone against batch {batch}")


def rows_left_out(subject: GradientSubject) -> None:
    """The first rows, the last ones, or every third, with dout = 0 and NaN in all others, and without the others."""
    inputs, case = subject.inputs, subject.case
    half, row = max(1, case.len_q // 2), np.arange(case.len_q)
    first = with_visible_keys(inputs, case, half)
    kept = [("first", row < half, first), ("last", row >= half, inputs)]
    if case.mask == "full":
        kept.append(("every third of the", row % 3 == 0, inputs))
    for name, rows, keys in kept:
        alone = keys.rows(rows)
        seen = np.arange(case.len_k) < alone.k.shape[2]
        each = [alone.items([item]) for item in range(case.batch)]
        whole = _spread(each, np.tile(rows, (case.batch, 1)), np.tile(seen, (case.batch, 1)))
        result, expected = subject.run(replace(whole, k=inputs.k, v=inputs.v)), subject.run(alone)
        _assert_part(result, expected, rows, seen, f"{name} {np.count_nonzero(rows)} rows")
        of_all = subject.baseline.q[:, :, rows]
        assert_same_bits(expected.q, of_all, case.dtype, f"{name} {np.count_nonzero(rows)} rows without the others: dq")


def mask_type(subject: GradientSubject) -> None:
    """The last query row sees every key under either mask."""
    length = subject.case.len_q
    last = subject.inputs.with_rows(length - 1, length)
    causal, full = (subject.run(last, mask=mask) for mask in ("causal", "full"))
    causal.assert_equals(full, "last row, causal against full")


def repeated_heads(subject: GradientSubject) -> None:
    """dq of grouped heads against the same keys and values repeated for every query head."""
    inputs, group = subject.inputs, subject.case.heads // subject.case.kv_heads
    repeated = replace(inputs, k=np.repeat(inputs.k, group, axis=1), v=np.repeat(inputs.v, group, axis=1))
    result = subject.run(repeated)
    assert_same_bits(result.q, subject.baseline.q, subject.case.dtype, "repeated key heads: dq")


def unseen_keys(subject: GradientSubject) -> None:
    """dq of rows that cannot see the last keys and values, whose contents change."""
    inputs, case = subject.inputs, subject.case
    hidden = max(1, min(case.len_q, case.len_k) // 2)
    k, v = inputs.k.copy(), inputs.v.copy()
    k[:, :, -hidden:] = v[:, :, -hidden:] = round_to_bits(np.array([3], np.float32), case.dtype)
    rows = np.s_[:, :, : case.len_q - hidden]
    got, expected = subject.run(replace(inputs, k=k, v=v)).q[rows], subject.baseline.q[rows]
    assert_same_bits(got, expected, case.dtype, f"the last {hidden} keys replaced: dq")


def key_lengths(subject: GradientSubject) -> None:
    """The last places of every sequence without keys and rows, of each another number, cut off by kv_lengths."""
    lengths = key_counts(subject.case)
    exists = np.arange(subject.case.len_k) < np.array(lengths)[:, None]
    _check_padding(subject, exists, "kv_lengths", kv_lengths=int32_array(subject.library, lengths))


def key_padding(subject: GradientSubject) -> None:
    """Places without keys and rows that key_padding_mask takes out: behind every sequence, before it, and inside."""
    for name, exists in padding_masks(subject.case).items():
        mask = bool_array(subject.library, exists)
        _check_padding(subject, exists, f"padding {name}", key_padding_mask=mask)


def packed_sequences(subject: GradientSubject) -> None:
    """The batch packed, of lengths that differ, with a sequence of NaN at both ends and empty ones between."""
    sequences = different_lengths(subject.inputs, subject.case)
    for item, result in enumerate(run_packed_among_nan(subject, sequences)):
        result.assert_equals(subject.run(sequences[item]), f"sequence {item}, packed against alone")


def _check_padding(subject: GradientSubject, exists: Which, name: str, **options: Any) -> None:
    """Sequences in a batch with NaN where no key is, each alone, and packed.

    At first queries are padded like the last keys, at whose places they stand. Then only the last rows of each sequence
    are there that can be alone: those that see one key more each, or all the same; without a causal mask all rows.
    """
    case = subject.case
    last = min(case.len_q, case.len_k)
    rows = np.ones((case.batch, case.len_q), bool)  # those before the first place of a key see none
    rows[:, case.len_q - last :] = exists[:, case.len_k - last :]
    _check_rows(subject, exists, rows, [case.mask] * case.batch, name, options)

    count = visible_keys(case.len_q, case.len_k, case.mask)
    tails = [list(spans(np.concatenate([[0], own.cumsum()])[count]))[-1:] for own in exists]
    masks = [mask for tail in tails for mask, *_ in tail]
    rows = np.arange(case.len_q) >= np.array([[first] for tail in tails for _, first, _ in tail]).reshape(-1, 1)
    if masks:
        _check_rows(subject, exists, rows, masks, f"{name}, last rows", options)


def _check_rows(
    subject: GradientSubject, exists: Which, rows: Which, masks: list[str], name: str, options: dict[str, Any]
) -> None:
    """``masks``: what the rows of each sequence see of its existing keys when they are alone."""
    alone = [
        subject.attended(subject.inputs.items([item]).rows(rows[item]).keys(exists[item]), mask)
        for item, mask in enumerate(masks)
    ]
    result = subject.run(_spread(alone, rows, exists), **options)
    one_mask = set(masks) == {subject.case.mask} and accepts(subject.op, CUMULATIVE[0])
    packed = subject.run_packed(alone) if one_mask else None
    for item, (own, mask) in enumerate(zip(alone, masks, strict=True)):
        expected, label = subject.run(own, mask), f"{name}, sequence {item}"
        _assert_part(result[item : item + 1], expected, rows[item], exists[item], label)
        if packed:
            packed[item].assert_equals(expected, f"{label}, packed against alone")


def _spread(alone: Sequence[Inputs], rows: Which, keys: Which) -> Inputs:
    """Sequences in one batch, their rows and keys at these places; between them zeros in dout and dlse, NaN else."""

    def spread(name: str) -> Bits:
        parts, places = [one.named[name] for one in alone], keys if name in "kv" else rows
        _, heads, _, *columns = parts[0].shape
        whole = poison((len(parts), heads, places.shape[1], *columns), parts[0].itemsize)
        if name in _ZERO:
            whole[...] = 0
        for item, part in enumerate(parts):
            whole[item][:, places[item]] = part[0]
        return whole

    upstream = {name: spread(name) for name in alone[0].upstream}
    return Inputs(spread("q"), spread("k"), spread("v"), upstream)


def _assert_part(got: Gradients, expected: Gradients, rows: Which, keys: Which, name: str) -> None:
    """These rows and keys are as expected, all others +0."""
    got.part(rows, keys).assert_equals(expected, f"{name} against alone")
    got.part(~rows, ~keys).assert_zero(f"{name}, where none is")
