"""Every way to ask for attention, over the same kind of sequences, and what `cuattn.attention` gives for each alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from packed import Both, assert_both_equal, bits_of
from problems import normal

import cuattn
from cuattn.testing import Library
from cuattn.testing.arrays import Bits, int32_array, poison, raw_bits, round_to_bits
from cuattn.testing.bitwise import assert_same_bits
from cuattn.testing.subject import Operation

#: Where the keys of a padded batch lie; the last one is no mask but kv_lengths.
PADDED = ("mask right", "mask left", "mask holes", "mask nothing", "mask all", "lengths")
CACHED = ("cache", "append", "packed cache", "packed append")
WAYS = (*PADDED, "packed", *CACHED)
PAGE_SIZES = (None, 1, 16, 48, 256)
LARGEST = {"float16": 65504.0, "bfloat16": 3.3895314e38, "float32": 3.4028235e38}
#: Places of a padded batch, or of a cache, behind the last key.
SLACK = 7
#: What two calls for the same sequences may differ in; ``turn`` is that of `arranged`.
ASKED: dict[str, tuple[Any, ...]] = {
    "way": WAYS,
    "rows": (1, 3, 64, 257),
    "num_splits": (1, 2, 3, 7, 64, None),
    "page_size": PAGE_SIZES,
    "layout": ("bshd", "bhsd"),
    "turn": (0, 1, 2),
}


@dataclass(frozen=True)
class Sequence:
    """Raw bits of q (Hq, rows, D), k (Hkv, keys, D), v (Hkv, keys, Dv); ``visible[i]`` keys are seen by row i."""

    q: Bits
    k: Bits
    v: Bits
    visible: list[int]

    def alone(self, attention: Operation, library: Library, dtype: str, mask: str) -> Both:
        """Bits of the output (Hq, rows, Dv) and of the LSE (Hq, rows)."""
        out = np.empty((*self.q.shape[:2], self.v.shape[2]), self.q.dtype)
        lse = np.empty(self.q.shape[:2], np.uint32)
        for first, end in pieces(self.visible, mask):
            keys = slice(self.visible[end - 1])
            parts = (self.q[:, first:end], self.k[:, keys], self.v[:, keys])
            arrays = (library.array(x[None], dtype) for x in parts)
            result = bits_of(attention(*arrays, mask, return_lse=True))
            out[:, first:end], lse[:, first:end] = (x[0] for x in result)
        return out, lse


@dataclass(frozen=True)
class Call:
    """A function of cuattn and its arguments on the host: bits of the case's dtype, int32 numbers or bools, options."""

    function: str
    arrays: dict[str, Bits]
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, library: Library, dtype: str) -> dict[str, Any]:
        arrays = {name: library.array(bits, dtype) for name, bits in self.arrays.items()}
        for name, numbers in self.numbers.items():
            kind, word = ("bool", np.uint8) if numbers.dtype == bool else ("int32", np.uint32)
            arrays[name] = library.array(numbers.astype(kind).view(word), kind)
        return arrays | self.options

    def run(self, arguments: dict[str, Any]) -> Both:
        return bits_of(getattr(cuattn, self.function)(**arguments, return_lse=True))


#: Bits of a prompt's q (Hq, tokens, D), k (Hkv, tokens, D) and v (Hkv, tokens, Dv).
Prompt = tuple[Bits, Bits, Bits]
#: Makes a call wrong.
Spoil = Callable[[Call], Call]


@dataclass(frozen=True)
class Surface:
    """One way of asking, for sequences with these numbers of rows and keys.

    way: one of WAYS. rows: of each sequence; the same for all where they are not packed. dims: D and Dv. heads: Hq and
    Hkv. page_size counts where there is a cache, layout where nothing is packed. ``finite``: what is not a key is an
    ordinary number and not NaN, infinite or huge.
    """

    way: str
    rows: tuple[int, ...]
    keys: tuple[int, ...]
    mask: str = "causal"
    dtype: str = "float16"
    dims: tuple[int, int] = (64, 64)
    heads: tuple[int, int] = (2, 1)
    num_splits: int | None = None
    page_size: int | None = None
    layout: str = "bshd"
    finite: bool = False
    seed: int = 0

    def __str__(self) -> str:
        kind = f"{self.dtype} d{self.dims[0]}/{self.dims[1]} {self.mask} {self.heads[0]}/{self.heads[1]} {self.layout}"
        pages = f" pages of {self.page_size}" * (self.way in CACHED and self.page_size is not None)
        lengths = f"{'+'.join(map(str, self.rows))}x{'+'.join(map(str, self.keys))}"
        return f"{self.way}{pages} {kind} {lengths} splits {self.num_splits}"

    @property
    def packed(self) -> bool:
        return self.way.startswith("packed")

    @cached_property
    def places(self) -> list[np.ndarray]:
        """Where each sequence's keys lie among the places of its batch entry."""
        counts = [np.arange(n) for n in self.keys]
        if self.way == "mask left":
            return [j + max(self.keys) + SLACK - len(j) for j in counts]
        if self.way == "mask holes":
            return [3 + j + j // 61 * 3 for j in counts]
        if self.way == "mask nothing":
            return [np.arange(max(self.keys)) for _ in counts]
        if self.way == "mask all":
            return [j[:0] for j in counts]
        return counts

    @property
    def capacity(self) -> int:
        """Places of a batch entry or of a cache."""
        last = max((int(places[-1]) + 1 for places in self.places if places.size), default=0)
        return last + (0 if self.way == "mask nothing" else SLACK)

    @cached_property
    def sequences(self) -> list[Sequence]:
        def sequence(number: int, rows: int, places: np.ndarray) -> Sequence:
            end = self.capacity if self.way in PADDED else len(places)
            first = end if self.mask == "full" else end - rows + 1
            ends = [min(max(first + i * (self.mask == "causal"), 0), end) for i in range(rows)]
            shapes = (self.heads[0], rows, self.dims[0]), *((self.heads[1], len(places), dim) for dim in self.dims)
            bits = (normal(shape, self.dtype, 1000 * self.seed + 10 * number + i) for i, shape in enumerate(shapes))
            return Sequence(*bits, np.searchsorted(places, ends).tolist())

        return [sequence(*item) for item in zip(range(len(self.rows)), self.rows, self.places, strict=True)]

    @property
    def starts(self) -> list[int]:
        return list(accumulate(self.rows, initial=0))

    def call(self) -> Call:
        common = {"mask": self.mask, "num_splits": self.num_splits}
        if self.way == "packed":
            arrays = {name: self._tokens(name) for name in "qkv"}
            lengths = {"cu_seqlens_q": self.rows, "cu_seqlens_k": self.keys}
            starts = {name: np.array(list(accumulate(x, initial=0))) for name, x in lengths.items()}
            return Call("attention_varlen", arrays, starts, common)
        if self.way in PADDED:
            return self._padded(common)
        return self._cached(common)

    def _padded(self, common: dict[str, Any]) -> Call:
        exists = np.zeros((len(self.keys), self.capacity), bool)
        arrays = {"q": np.stack([s.q for s in self.sequences])}
        for name, dim in zip("kv", self.dims, strict=True):
            arrays[name] = self._garbage((len(self.keys), self.heads[1], self.capacity, dim))
            for b, places in enumerate(self.places):
                arrays[name][b, :, places] = getattr(self.sequences[b], name).swapaxes(0, 1)
                exists[b, places] = True
        lengths = {"kv_lengths": np.array(self.keys)} if self.way == "lengths" else {"key_padding_mask": exists}
        arrays = {name: self._laid_out(x) for name, x in arrays.items()}
        return Call("attention", arrays, lengths, common | {"layout": self.layout})

    def _cached(self, common: dict[str, Any]) -> Call:
        new = self.rows if "append" in self.way else [0] * len(self.rows)
        before = [n - more for n, more in zip(self.keys, new, strict=True)]
        numbers = {"cache_lengths": np.array(before)}
        if self.page_size:
            numbers["block_table"] = self.table
        arrays = self.caches(before)
        if self.packed:
            numbers["cu_seqlens_q"] = np.array(self.starts)
            arrays["q"] = self._tokens("q")
        else:
            arrays["q"] = self._laid_out(np.stack([s.q for s in self.sequences]))
            common = common | {"layout": self.layout}
        if "append" in self.way:
            for name in "kv":
                if self.packed:
                    arrays[f"{name}_new"] = self._tokens(name, before)
                else:
                    fresh = [getattr(s, name)[:, n:] for s, n in zip(self.sequences, before, strict=True)]
                    arrays[f"{name}_new"] = self._laid_out(np.stack(fresh))
        return Call("attention_kvcache", arrays, numbers, common)

    @cached_property
    def table(self) -> np.ndarray:
        """Pages in a shuffled order; three of the cache's belong to nobody."""
        assert self.page_size
        pages = -(-self.capacity // self.page_size)
        order = np.random.default_rng(self.seed).permutation(len(self.keys) * pages + 3)
        return order[: len(self.keys) * pages].reshape(-1, pages)

    def caches(self, lengths: list[int] | tuple[int, ...]) -> dict[str, Bits]:
        """The caches with so many keys of each sequence, in the layout of the call; garbage everywhere else."""
        size = self.page_size
        shape = (self.table.size + 3, size) if size else (len(self.keys), self.capacity)
        caches = {}
        for name, dim in zip("kv", self.dims, strict=True):
            cache = self._garbage((shape[0], self.heads[1], shape[1], dim))
            for b, length in enumerate(lengths):
                j = np.arange(length)
                first, token = (self.table[b, j // size], j % size) if size else (b, j)
                cache[first, :, token] = getattr(self.sequences[b], name)[:, :length].swapaxes(0, 1)
            caches[f"{name}_cache"] = cache.swapaxes(1, 2) if self.packed else self._laid_out(cache)
        return caches

    def _tokens(self, name: str, first: list[int] | None = None) -> Bits:
        """Of all sequences, from each one's ``first`` on, (tokens, heads, columns)."""
        first = first or [0] * len(self.rows)
        return np.concatenate(
            [getattr(s, name)[:, n:].swapaxes(0, 1) for s, n in zip(self.sequences, first, strict=True)]
        )

    def _laid_out(self, x: Bits) -> Bits:
        return x.swapaxes(1, 2) if self.layout == "bshd" else x

    def _garbage(self, shape: tuple[int, ...]) -> Bits:
        if self.finite:
            return normal(shape, self.dtype, 99)
        largest = LARGEST[self.dtype]
        return np.resize(round_to_bits(np.array([np.nan, np.inf, -np.inf, largest, -largest]), self.dtype), shape)

    def run(self, library: Library, spoil: Spoil | None = None) -> tuple[list[Both], dict[str, Bits]]:
        """Bits of each sequence's output (Hq, rows, Dv) and LSE (Hq, rows); the caches afterwards."""
        call = self.call()
        arguments = (spoil(call) if spoil else call).arguments(library, self.dtype)
        results = self.split(*call.run(arguments))
        return results, {name: raw_bits(arguments[name])[0] for name in arguments if name.endswith("_cache")}

    def split(self, out: Bits, lse: Bits) -> list[Both]:
        if not self.packed:
            return list(zip(self._laid_out(out), lse, strict=True))
        spans = [slice(*span) for span in pairwise(self.starts)]
        return [(out[span].swapaxes(0, 1), lse[:, span]) for span in spans]

    def alone(self, attention: Operation, library: Library) -> list[Both]:
        return [s.alone(attention, library, self.dtype, self.mask) for s in self.sequences]

    def check(self, library: Library) -> None:
        """Together like each alone, on the backend that is active; caches have the new keys and are else untouched."""
        results, caches = self.run(library)
        self.assert_same(results, self.alone(cuattn.attention, library))
        if caches:
            self.assert_caches(caches)

    def assert_caches(self, caches: dict[str, Bits]) -> None:
        for name, expected in self.caches(self.keys).items():
            assert_same_bits(caches[name], expected, self.dtype, f"{self}: {name}")

    def assert_same(self, actual: list[Both], expected: list[Both]) -> None:
        for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_both_equal(one, other, self.dtype, f"{self}: sequence {number}")


def arranged(way: str, rows: int, turn: int, lengths: dict[int, tuple[int, ...]], **rest: Any) -> Surface:
    """Sequences of lengths[rows] keys, turned so that each comes to stand at another place of the batch."""
    keys = np.roll(lengths[rows], turn).tolist()
    counts = (rows, 1, 5, 0)[: len(keys)] if way.startswith("packed") else (rows,) * len(keys)
    new = counts if "append" in way else (0,) * len(keys)
    return Surface(way, counts, tuple(n + more for n, more in zip(keys, new, strict=True)), **rest)


def pieces(visible: list[int], mask: str) -> Iterator[tuple[int, int]]:
    """(first row, end row) of the runs that one call without padding computes: each causal row sees one key more."""
    step = int(mask == "causal")
    first = 0
    for row in range(1, len(visible) + 1):
        if row == len(visible) or (visible[row] - visible[row - 1] != step and visible[row] > 0):
            yield first, row
            first = row


def spoiled(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """A call of which one argument is another."""

    def spoil(call: Call) -> Call:
        for kind in ("numbers", "arrays"):
            if name in getattr(call, kind):
                return replace(call, **{kind: getattr(call, kind) | {name: change(getattr(call, kind)[name])}})
        raise KeyError(name)

    return spoil


def covering(factors: dict[str, tuple[Any, ...]], seed: int = 0) -> list[dict[str, Any]]:
    """Combinations in which any two values of two factors meet, chosen greedily; the same ones for a seed."""
    random = np.random.default_rng(seed)
    names = list(factors)
    sizes = [len(factors[name]) for name in names]
    pairs = {
        (a, i, b, j) for a in range(len(names)) for b in range(a) for i in range(sizes[a]) for j in range(sizes[b])
    }

    def met(levels: np.ndarray) -> set[tuple[int, int, int, int]]:
        return {(a, int(levels[a]), b, int(levels[b])) for a in range(len(names)) for b in range(a)}

    chosen = []
    while pairs:
        a, i, b, j = min(pairs)
        candidates = random.integers(0, sizes, (20, len(names)))
        candidates[:, [a, b]] = i, j
        best = max(candidates, key=lambda levels: len(met(levels) & pairs))
        pairs -= met(best)
        chosen.append({name: factors[name][level] for name, level in zip(names, best, strict=True)})
    return chosen


def fed(
    prompts: list[Prompt],
    schedule: list[tuple[int, ...]],
    library: Library,
    dtype: str,
    page_size: int | None = None,
    wrong: int = 0,
) -> list[Both]:
    """Bits of each prompt's output (Hq, tokens, Dv) and LSE, fed through a cache in steps of so many tokens of each.

    Steps of equal numbers are dense calls, others packed ones. The cache starts full of NaN, its pages lie anywhere.
    ``wrong``: how many keys too few the lengths say after the first step.
    """
    count, capacity = len(prompts), max(q.shape[1] for q, _, _ in prompts) + SLACK
    options: dict[str, Any] = {"mask": "causal", "return_lse": True}
    shape: tuple[int, ...] = (count, capacity)
    if page_size:
        pages = -(-capacity // page_size)
        table = np.random.default_rng(1).permutation(count * pages).reshape(count, pages)
        options["block_table"] = int32_array(library, table)
        shape = (count * pages, page_size)
    for name, x in zip("kv", prompts[0][1:], strict=True):
        options[f"{name}_cache"] = library.array(poison((*shape, x.shape[0], x.shape[2]), x.itemsize), dtype)
    done, parts = np.zeros(count, int), []
    for counts in schedule:
        spans = [slice(n, n + more) for n, more in zip(done, counts, strict=True)]
        dense = len(set(counts)) == 1
        gather = np.stack if dense else np.concatenate
        q, k, v = (
            library.array(gather([x[i][:, span].swapaxes(0, 1) for x, span in zip(prompts, spans, strict=True)]), dtype)
            for i in range(3)
        )
        starts = list(accumulate(counts, initial=0))
        packed = {} if dense else {"cu_seqlens_q": int32_array(library, starts)}
        lengths = int32_array(library, np.maximum(done - wrong, 0))
        out, lse = bits_of(cuattn.attention_kvcache(q, cache_lengths=lengths, k_new=k, v_new=v, **options, **packed))
        if dense:
            out, lse = out.reshape(-1, *out.shape[2:]), np.concatenate(list(lse), axis=1)
        parts.append([(out[a:b].swapaxes(0, 1), lse[:, a:b]) for a, b in pairwise(starts)])
        done += counts
    return [tuple(np.concatenate(x, axis=1) for x in zip(*own, strict=True)) for own in zip(*parts, strict=True)]
