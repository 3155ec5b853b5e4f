"""The kernels around attention, emulated, and what NumPy says that they should do."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cuattn import emulator
from cuattn.interop import Tensor, import_tensor
from cuattn.launches import Target
from cuattn.problem import Append, Sequences
from cuattn.schedule import plan_append, plan_scan

TARGET = Target("sm_80", 3)
Array = npt.NDArray[Any]


def tensors(arrays: dict[str, Array]) -> dict[str, Tensor]:
    return {name: import_tensor(array, name) for name, array in arrays.items()}


def scan(mask: Array, schedule: str = "ascending", seed: int = 1) -> tuple[Array, Array]:
    """(positions, seen) of a mask (batch, length); what the kernel leaves alone is -1."""
    tables: list[Array] = []

    def allocate(shape: tuple[int, ...], dtype: str) -> Tensor:
        tables.append(np.full(shape, -1, dtype))
        return import_tensor(tables[-1], "table")

    emulator.run([plan_scan(import_tensor(mask, "mask"), TARGET, allocate)], schedule, seed)
    return tables[0], tables[1]


def expected_scan(mask: Array) -> tuple[Array, Array]:
    """Behind a row's last position its table is zero; a table of no keys is left alone."""
    positions = np.full((mask.shape[0], max(1, mask.shape[1])), 0 if mask.shape[1] else -1, np.int32)
    for row, places in zip(mask, positions, strict=True):
        valid = np.flatnonzero(row)
        places[: valid.size] = valid
    seen = np.zeros((len(mask), mask.shape[1] + 2), np.int32)
    seen[:, 1:-1] = np.cumsum(mask, axis=1)
    for row, keys in zip(seen, map(np.flatnonzero, mask), strict=True):
        in_one_piece = keys.size == 0 or keys[-1] - keys[0] == keys.size - 1
        row[-1] = keys[:1].sum() if in_one_piece else -1
    return positions, seen


def random_mask(length: int, batch: int = 2) -> Array:
    return np.random.Generator(np.random.Philox(key=length)).random((batch, length)) < 0.6


@dataclass
class Cache:
    """Caches of bit patterns (sequence or page, head, token, column), and what is appended to them."""

    key: Array
    value: Array
    new_key: Array  # (batch, head, token, column); packed: batch 1
    new_value: Array
    lengths: list[int]
    table: Array | None = None  # (sequence, page)
    starts: list[int] | None = None

    @property
    def capacity(self) -> int:
        return self.key.shape[2] * (1 if self.table is None else self.table.shape[1])

    def append(self, schedule: str = "ascending", seed: int = 1, processors: int = TARGET.processors) -> None:
        """Runs the kernel, which writes to the caches."""
        arrays = tensors({name: getattr(self, name) for name in ("key", "value", "new_key", "new_value")})
        lists = {"lengths": self.lengths, "table": self.table, "starts": self.starts}
        places = tensors({name: np.array(x, np.int32) for name, x in lists.items() if x is not None})
        sequences = Sequences(
            len(self.lengths),
            query_starts=places.get("starts"),
            key_lengths=places["lengths"],
            new_keys=True,
            block_table=places.get("table"),
        )
        append = Append(arrays["new_key"], arrays["new_value"])
        target = Target(TARGET.arch, processors)
        emulator.run(plan_append(append, sequences, arrays["key"], arrays["value"], target), schedule, seed)

    def expected(self) -> tuple[Array, Array]:
        """The caches after the call, one token after the other."""
        key, value = self.key.copy(), self.value.copy()
        for sequence, length in enumerate(self.lengths):
            batch, first, end = sequence, 0, self.new_key.shape[2]
            if self.starts is not None:
                batch, (first, end) = 0, self.starts[sequence : sequence + 2]
            for token in range(first, end):
                position = length + token - first
                if length < 0 or position >= self.capacity:
                    continue
                place = (sequence, position)
                if self.table is not None:
                    page, slot = divmod(position, self.key.shape[2])
                    place = (int(self.table[sequence, page]), slot)
                    if not 0 <= place[0] < len(self.key):
                        continue
                key[place[0], :, place[1]] = self.new_key[batch, :, token]
                value[place[0], :, place[1]] = self.new_value[batch, :, token]
        return key, value

    def check(self, schedule: str = "ascending", processors: int = TARGET.processors) -> None:
        """Appends; every bit of the caches counts."""
        before, expected = (self.key.copy(), self.value.copy()), self.expected()
        self.append(schedule, processors=processors)
        for got, wanted, old in zip((self.key, self.value), expected, before, strict=True):
            assert not np.array_equal(wanted, old), "nothing is appended"
            np.testing.assert_array_equal(got, wanted)


def bits(*shape: int, dtype: type = np.uint16) -> Array:
    """Random patterns, of which none has all bits set."""
    return np.random.Generator(np.random.Philox(key=sum(shape))).integers(0, np.iinfo(dtype).max, shape, dtype)


def cache(
    lengths: list[int],
    new: int,
    capacity: int = 100,
    heads: int = 2,
    dims: tuple[int, int] = (64, 24),
    page_size: int | None = None,
    starts: list[int] | None = None,
    dtype: type = np.uint16,
) -> Cache:
    """Caches of NaN (all bits set) for sequences of these lengths; the pages of all sequences are shuffled."""
    batch = 1 if starts else len(lengths)
    new_key, new_value = (bits(batch, heads, new, dim, dtype=dtype) for dim in dims)
    table, places, tokens = None, len(lengths), capacity
    if page_size is not None:
        pages = -(-capacity // page_size)
        places, tokens = len(lengths) * pages + 3, page_size
        shuffled = np.random.Generator(np.random.Philox(key=page_size)).permutation(places)
        table = shuffled[: len(lengths) * pages].reshape(len(lengths), pages)
    key, value = (np.full((places, heads, tokens, dim), np.iinfo(dtype).max, dtype) for dim in dims)
    return Cache(key, value, new_key, new_value, lengths, table, starts)
