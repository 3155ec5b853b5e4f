"""The CPU reference on caches: lengths, pages, packed queries, new keys."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
from problems import (
    WORD,
    Both,
    assert_both_differ,
    assert_both_same,
    attend,
    both_masks,
    every_dtype,
    int32,
    normal,
    qkv,
    tensor,
)

from cuattn import reference
from cuattn.problem import PACKED, Append, Sequences
from cuattn.testing.arrays import Bits, poison
from cuattn.testing.bitwise import assert_same_bits


class Cache:
    """Keys and values of sequences, contiguous or in pages of a shuffled order, NaN where nothing is written."""

    def __init__(self, k: Bits, v: Bits, lengths: Sequence[int], page_size: int | None = None, seed: int = 0) -> None:
        batch, heads, capacity, _ = k.shape
        self.table: Any = None
        self.lengths = list(lengths)
        if page_size:
            pages = -(-capacity // page_size)
            order = np.random.default_rng(seed).permutation(batch * pages + 3)  # three belong to nobody
            self.table = order[: batch * pages].reshape(batch, pages)
        sizes = (len(order), heads, page_size) if page_size else (batch, heads, capacity)
        self.arrays = [poison((*sizes, x.shape[3]), x.itemsize) for x in (k, v)]
        for b, length in enumerate(lengths):
            for cache, x in zip(self.arrays, (k, v), strict=True):
                for j in range(length):
                    page, token = (b, j) if page_size is None else (self.table[b, j // page_size], j % page_size)
                    cache[page, :, token] = x[b, :, j]

    def sequences(self, query_starts: Sequence[int] | None = None, new_keys: bool = False) -> Sequences:
        return Sequences(
            len(self.lengths),
            query_starts=None if query_starts is None else int32(query_starts),
            key_lengths=int32(self.lengths),
            cached=True,
            new_keys=new_keys,
            block_table=None if self.table is None else int32(self.table),
        )

    def attend(self, q: Bits, mask: str = "causal", dtype: str = "float16") -> Both:
        return attend(q, *self.arrays, mask, dtype, sequences=self.sequences())


PAGE_SIZES = (None, 1, 16, 48, 256)


class TestCache:
    LENGTHS = (700, 1, 0, 513, 64)

    @staticmethod
    def alone(q: Bits, k: Bits, v: Bits, lengths: Sequence[int], mask: str, dtype: str) -> Both:
        one = [
            attend(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], mask, dtype) for b, n in enumerate(lengths)
        ]
        return np.concatenate([x for x, _ in one]), np.concatenate([x for _, x in one])

    @both_masks
    @pytest.mark.parametrize(("dtype", "rows"), [("float16", 1), ("bfloat16", 7), ("float32", 3)])
    def test_pages_and_lengths(self, dtype: str, rows: int, mask: str) -> None:
        q, k, v = qkv(5, rows, 720, dtype)
        expected = self.alone(q, k, v, self.LENGTHS, mask, dtype)
        for page_size in PAGE_SIZES:
            cache = Cache(k, v, self.LENGTHS, page_size)
            assert_both_same(cache.attend(q, mask, dtype), expected, dtype)
            if page_size == 16:
                cache.table[:, 0] = np.roll(cache.table[:, 0], 1)
                assert_both_differ(cache.attend(q, mask, dtype), expected)

    @both_masks
    @pytest.mark.parametrize("page_size", [None, 48])
    def test_packed_queries(self, page_size: int | None, mask: str) -> None:
        counts = (1, 70, 2, 0, 7)
        starts = list(accumulate(counts, initial=0))
        _, k, v = qkv(5, 0, 720)
        q = normal((1, 4, starts[-1], 16))
        cache = Cache(k, v, self.LENGTHS, page_size)
        packed = attend(q, *cache.arrays, mask, layout=PACKED, sequences=cache.sequences(starts))
        wrong = attend(q, *cache.arrays, mask, layout=PACKED, sequences=cache.sequences([0, 2, *starts[2:]]))
        for s, (first, end) in enumerate(pairwise(starts)):
            keys = np.s_[s : s + 1, :, : self.LENGTHS[s]]
            alone = attend(q[:, :, first:end], k[keys], v[keys], mask)
            assert_both_same((packed[0][:, :, first:end], packed[1][:, :, first:end]), alone)
        assert_both_differ(wrong, packed)

    def test_lengths_beyond_the_capacity(self) -> None:
        q, k, v = qkv(3, 2, 96)
        expected = attend(q, k, v)
        for page_size in (None, 16):
            cache = Cache(k, v, (96, 96, 96), page_size)
            cache.lengths = [97, 2**31 - 1, 96]
            assert_both_same(cache.attend(q), expected)
            cache.lengths = [-1, 95, 0]
            out, lse = cache.attend(q)
            assert not out[0].any()
            assert not out[2].any()
            assert_both_differ((out[1], lse[1]), (expected[0][1], expected[1][1]))

    def test_pages_outside_are_clamped(self) -> None:
        q, k, v = qkv(1, 2, 48)
        cache = Cache(k, v, (48,), 16)
        pages = len(cache.arrays[0])
        cache.table[0] = [0, pages - 1, 2]
        for array in cache.arrays:
            array[:] = normal(array.shape)
        expected = cache.attend(q)
        cache.table[0] = [-7, pages, 2]
        assert_both_same(cache.attend(q), expected)
        cache.table[0] = [1, pages, 2]
        assert_both_differ(cache.attend(q), expected)

    def test_right_padding_keeps_the_diagonal_where_it_is(self) -> None:
        """Without a cache, key_lengths cut keys off: row i of 3 sees min(length, 100 - 3 + i + 1) keys."""
        q, k, v = qkv(1, 3, 100)
        padded = Sequences(1, key_lengths=int32([99]))
        rows = [attend(q[:, :, i : i + 1], k[:, :, :n], v[:, :, :n], "full") for i, n in enumerate((98, 99, 99))]
        expected = tuple(np.concatenate([r[i] for r in rows], axis=2) for i in (0, 1))
        assert_both_same(attend(q, k, v, sequences=padded), expected)
        assert_both_differ(attend(q, k, v, sequences=replace(padded, cached=True)), expected)


class TestAppend:
    @pytest.mark.parametrize("page_size", PAGE_SIZES)
    @pytest.mark.parametrize(("dtype", "packed"), [("float16", False), ("bfloat16", True), ("float32", True)])
    def test_chunk_by_chunk(self, dtype: str, packed: bool, page_size: int | None) -> None:
        """A prompt fed in chunks and then decoded has the bits of a single causal call over all of it."""
        steps = ((100, 100), (1, 1), (65, 65), (3, 3)) if not packed else ((100, 1), (0, 64), (1, 0), (68, 104))
        q, k, v = qkv(2, 169, 169, dtype)
        expected = attend(q, k, v, "causal", dtype)
        results = {early: self.fed(q, k, v, steps, dtype, packed, page_size, early) for early in (0, 1)}
        assert_both_same(results[0], expected, dtype)
        assert_both_differ(results[1], expected)

    @staticmethod
    def fed(q: Bits, k: Bits, v: Bits, steps: Any, dtype: str, packed: bool, page_size: int | None, early: int) -> Both:
        """``early``: by how many keys the cache's lengths are wrong after the first step."""
        cache = Cache(k, v, (0, 0), page_size)
        out, lse = poison((*q.shape[:3], v.shape[3]), q.itemsize), poison(q.shape[:3], 4)
        done = [0, 0]
        for counts in steps:
            spans = [slice(n, n + count) for n, count in zip(done, counts, strict=True)]
            pieces = [[x[b : b + 1, :, span] for b, span in enumerate(spans)] for x in (q, k, v)]
            query, *new = (np.concatenate(piece, axis=2 if packed else 0) for piece in pieces)
            starts = list(accumulate(counts, initial=0)) if packed else None
            cache.lengths = [max(0, n - early) for n in done]
            options = {"layout": PACKED} if packed else {}
            append = Append(*(tensor(x, dtype) for x in new))
            sequences = cache.sequences(starts, new_keys=True)
            result = attend(query, *cache.arrays, "causal", dtype, sequences=sequences, append=append, **options)
            for b, span in enumerate(spans):
                rows = np.s_[0, :, starts[b] : starts[b + 1]] if starts else np.s_[b]
                out[b, :, span], lse[b, :, span] = result[0][rows], result[1][rows]
            done = [span.stop for span in spans]
        if not early:
            whole = Cache(k, v, done, page_size)
            for actual, written in zip(cache.arrays, whole.arrays, strict=True):
                assert_same_bits(actual, written, f"uint{8 * actual.itemsize}", "cache")
        return out, lse

    @pytest.mark.parametrize("page_size", [None, 1, 16, 48])
    def test_writes_nowhere_else(self, page_size: int | None) -> None:
        """Positions before 0 and beyond the capacity, and pages that are none, are left out."""
        _, k, v = qkv(4, 0, 96)
        cache = Cache(k, v, (0, 5, 90, 96), page_size)
        cache.lengths = [-3, 5, 90, 2**31 - 4]
        bad_page = page_size == 16
        if bad_page:
            cache.table[1, 0] = -1
            cache.table[2, 5] = len(cache.arrays[0])
        new = [normal((4, 2, 10, x.shape[3]), seed=9) for x in (k, v)]
        expected = [x.copy() for x in cache.arrays]
        for array, fresh in zip(expected, new, strict=True):
            for b, first, places in ((0, 3, range(7)), (1, 0, range(5, 15)), (2, 0, range(90, 96))):
                for i, j in enumerate(places, first):
                    if not (bad_page and b > 0):
                        page, token = (cache.table[b, j // page_size], j % page_size) if page_size else (b, j)
                        array[page, :, token] = fresh[b, :, i]
        tensors = [tensor(x, "float16") for x in (*new, *cache.arrays)]
        reference.append(Append(*tensors[:2]), cache.sequences(new_keys=True), *tensors[2:])
        for actual, written, fresh in zip(cache.arrays, expected, new, strict=True):
            assert_same_bits(actual, written, "float16")
            assert (actual[:, :, 0] == fresh[0, :, 3]).any()

    @every_dtype
    def test_copies_bits(self, dtype: str) -> None:
        """NaN payloads and -0 too."""
        new = np.random.default_rng(0).integers(0, 2**32, (1, 2, 50, 8), np.uint64).astype(WORD[dtype])
        cache = [poison((1, 2, 60, 8), new.itemsize) for _ in range(2)]
        tensors = [tensor(x, dtype) for x in (new, new, *cache)]
        sequences = Sequences(1, key_lengths=int32([4]), cached=True, new_keys=True)
        reference.append(Append(*tensors[:2]), sequences, *tensors[2:])
        for array in cache:
            assert_same_bits(array[:, :, 4:54], new, f"uint{8 * new.itemsize}")
            assert not (~array[:, :, :4]).any()
            assert not (~array[:, :, 54:]).any()
