"""Where the rows and keys of sequences lie, and where new keys go."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cuattn.interop import Tensor, host_bits
from cuattn.problem import Append, Problem, Sequences
from cuattn.reference.gold import visible_keys

Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Sequence:
    """One sequence of a problem.

    queries: where its rows lie, ``query[batch, head, tokens]`` for (batch, tokens).
    keys: where the keys that exist lie, ascending: ``key[batch, head, tokens]`` for (batch, tokens); paged, both are
        arrays, of the page and of the token in it.
    visible: (rows,), how many of these keys each row sees, ascending.
    """

    queries: tuple[int, slice]
    keys: tuple[int | Integers, slice | Integers]
    visible: Integers


def sequences_of(problem: Problem) -> Iterator[Sequence]:
    sequences = problem.sequences or Sequences(problem.batch)
    padding = problem.key_padding_mask
    for s in range(sequences.count):
        batch, rows = _tokens(sequences.query_starts, s, problem.query_length)
        key_batch, places = _tokens(sequences.key_starts, s, problem.key_length)
        count, length = rows.stop - rows.start, places.stop - places.start
        end = length
        if sequences.key_lengths:
            existing = _numbers(sequences.key_lengths)[s] + (count if sequences.new_keys else 0)
            length = int(np.clip(existing, 0, length))
            end = length if sequences.cached else end
        visible = np.minimum(visible_keys(count, end, problem.mask), length)
        keys: tuple[int | Integers, slice | Integers] = key_batch, slice(places.start, places.start + length)
        if padding:
            exists = host_bits(padding)[s].astype(bool)
            keys = key_batch, np.flatnonzero(exists)
            visible = np.append(0, np.cumsum(exists))[visible]
        if sequences.block_table:
            pages, tokens = _in_cache(sequences.block_table, s, np.arange(length), problem.page_size)
            keys = pages.clip(0, problem.key.shape[0] - 1), tokens
        yield Sequence((batch, rows), keys, visible)


def append(new: Append, sequences: Sequences, key: Tensor, value: Tensor) -> None:
    """Copies new keys and values into the caches ``key`` and ``value``, behind the key_lengths of each sequence.

    Caches have the axes (batch, head, token, column) or, with a block table, (page, head, token of the page, column);
    new keys (batch, head, token, column), packed where there are query_starts. Those beyond the capacity, and those
    whose page is none of the cache's, are not written.
    """
    assert sequences.key_lengths
    lengths = _numbers(sequences.key_lengths)
    for source, target in ((new.key, key), (new.value, value)):
        fresh, cache = host_bits(source), host_bits(target)
        for s in range(sequences.count):
            batch, rows = _tokens(sequences.query_starts, s, source.shape[2])
            positions = lengths[s] + np.arange(rows.stop - rows.start)
            places, tokens = _in_cache(sequences.block_table, s, positions, cache.shape[2])
            kept = (places >= 0) & (places < cache.shape[0]) & (tokens >= 0) & (tokens < cache.shape[2])
            # an axis between two index arrays comes last: (token, head, column)
            cache[places[kept], :, tokens[kept]] = fresh[batch, :, rows][:, kept].swapaxes(0, 1)


def _numbers(tensor: Tensor) -> Integers:
    return host_bits(tensor).view(np.int32).astype(np.int64)


def _tokens(starts: Tensor | None, s: int, length: int) -> tuple[int, slice]:
    """Batch entry and tokens of sequence s, of the given length or packed."""
    return (0, slice(*_numbers(starts)[s : s + 2].tolist())) if starts else (s, slice(0, length))


def _in_cache(block_table: Tensor | None, s: int, positions: Integers, page_size: int) -> tuple[Integers, Integers]:
    """Batch entry or page, and token therein, of positions in sequence s; page -1 for those outside of the table."""
    if not block_table:
        return np.full_like(positions, s), positions
    pages = np.append(_numbers(block_table)[s], -1)
    return pages[np.clip(positions // page_size, -1, len(pages) - 1)], positions % page_size
