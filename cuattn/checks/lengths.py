"""int32 arrays of lengths and pages: their form, and, where they may be read, their numbers."""

from typing import Any

import numpy as np
import numpy.typing as npt

from cuattn.checks.arrays import Named, check_contiguous, check_place
from cuattn.interop import Tensor, import_tensor
from cuattn.problem import Sequences

Numbers = npt.NDArray[np.signedinteger[Any]]


def import_numbers(name: str, array: object, first: Named, dimensions: int = 1) -> Tensor:
    """A contiguous int32 array beside ``first``."""
    tensor = import_tensor(array, name)
    if tensor.dtype != "int32":
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected int32")
    check_place(name, tensor, first)
    if len(tensor.shape) != dimensions:
        plural = "s" if dimensions > 1 else ""
        raise ValueError(f"{name}: got shape {tensor.shape}, expected {dimensions} dimension{plural}")
    check_contiguous(name, tensor)
    return tensor


def import_starts(name: str, array: object, first: Named, tokens: int) -> Tensor:
    """Cumulative lengths of packed sequences that have ``tokens`` tokens together."""
    starts = import_numbers(name, array, first)
    if starts.shape[0] == 0:
        raise ValueError(f"{name}: got shape (0,), expected (sequences + 1,)")
    if starts.shape[0] == 1 and tokens > 0:
        raise ValueError(f"{name}: got no sequence, expected {tokens} tokens in sequences")
    return starts


def numbers_to_check(tensor: Tensor, checked: bool) -> Numbers | None:
    """The elements: on a GPU, where reading waits for its work, in checked mode alone; None where they are not read."""
    return tensor.framework.to_host(tensor) if checked or tensor.device.kind == "cpu" else None


def check_starts(name: str, starts: Tensor, tokens: int, checked: bool) -> None:
    found = numbers_to_check(starts, checked)
    if found is not None and (found[0] != 0 or found[-1] != tokens or (np.diff(found.astype(np.int64)) < 0).any()):
        raise ValueError(f"{name}: got {found.tolist()}, expected ascending numbers from 0 to the {tokens} tokens")


def check_key_lengths(lengths: Tensor, key_length: int, checked: bool) -> None:
    found = numbers_to_check(lengths, checked)
    if found is not None and ((found < 0) | (found > key_length)).any():
        raise ValueError(f"kv_lengths: got {found.tolist()}, expected numbers from 0 to k's length {key_length}")


def check_cache_numbers(sequences: Sequences, new_length: int, cache: Tensor, checked: bool) -> None:
    """Lengths within the capacity, pages within the cache, and a place of its own for every new key.

    new_length: rows of each sequence; packed: of all together. cache: keys, in kernel axes.
    """
    assert sequences.key_lengths is not None
    found = numbers_to_check(sequences.key_lengths, checked)
    if found is None:
        return
    lengths = found.astype(np.int64)
    new = np.zeros_like(lengths)
    if sequences.new_keys:
        new = _new_lengths(sequences, new_length)
    table, page_size = None, max(1, cache.shape[2])
    capacity = cache.shape[2]
    if sequences.block_table is not None:
        table = sequences.block_table.framework.to_host(sequences.block_table)
        capacity *= table.shape[1]
    if ((lengths < 0) | (lengths + new > capacity)).any():
        room = f" less the {new.tolist()} new keys" if sequences.new_keys else ""
        raise ValueError(
            f"cache_lengths: got {lengths.tolist()}, expected numbers from 0 to the capacity {capacity}{room}"
        )
    if table is None:
        return
    used = np.arange(table.shape[1]) * page_size < (lengths + new)[:, None]
    wrong = used & ((table < 0) | (table >= cache.shape[0]))
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0].tolist())
        raise ValueError(f"block_table: got {table[place]} at {place}, expected pages from 0 to {cache.shape[0] - 1}")
    owner = np.repeat(np.arange(sequences.count), new)
    key = lengths[owner] + np.arange(new.sum()) - (np.cumsum(new) - new)[owner]
    places = table[owner, key // page_size].astype(np.int64) * page_size + key % page_size
    if np.unique(places).size < places.size:
        raise ValueError("block_table: got one page for new keys of two sequences, expected pages of their own")


def _new_lengths(sequences: Sequences, new_length: int) -> npt.NDArray[np.int64]:
    """How many new keys each sequence has."""
    if sequences.query_starts is None:
        return np.full(sequences.count, new_length, np.int64)
    starts: npt.NDArray[np.int64] = sequences.query_starts.framework.to_host(sequences.query_starts).astype(np.int64)
    return starts[1:] - starts[:-1]
