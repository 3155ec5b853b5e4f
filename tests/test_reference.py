"""The CPU reference on every head dim and dtype, with padding masks, and chunk by chunk."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from problems import WORD, Both, assert_both_differ, assert_both_same, attend, both_masks, every_dtype, qkv, tensor

from cuattn import contract, reference
from cuattn.interop import import_tensor
from cuattn.problem import Problem
from cuattn.reference.gold import gold_attention
from cuattn.testing.accuracy import relative_error
from cuattn.testing.arrays import Bits, poison, round_to_bits, values_of

#: Relative L2 error of the output that each dtype's roundings of weights and output explain.
TOLERANCE = {"float16": 4e-4, "bfloat16": 3e-3, "float32": 3e-6}


def assert_accurate(actual: Both, gold: tuple[Any, Any], dtype: str) -> None:
    out, lse = values_of(actual[0], dtype), actual[1].view(np.float32)
    assert relative_error(out, gold[0]) < TOLERANCE[dtype]
    np.testing.assert_allclose(lse, gold[1], rtol=2e-6, atol=2e-6)


def doubles(dtype: str, *arrays: Bits) -> list[Any]:
    return [values_of(x, dtype).astype(np.float64) for x in arrays]


class TestHeadDims:
    @every_dtype
    @both_masks
    @pytest.mark.parametrize(
        ("head_dim", "value_dim"), [(8, 8), (8, 256), (40, 72), (128, 64), (128, 136), (192, 128), (256, 256)]
    )
    def test_against_gold(self, head_dim: int, value_dim: int, mask: str, dtype: str) -> None:
        q, k, v = qkv(1, 9, 600, dtype, head_dim, value_dim)
        scale = head_dim**-0.5
        gold = gold_attention(*doubles(dtype, q, k, v), mask, scale)
        assert_accurate(attend(q, k, v, mask, dtype, scale=scale), gold, dtype)

    @pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 136), (136, 16)])
    def test_the_larger_one_decides_the_tile(
        self, head_dim: int, value_dim: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        q, k, v = qkv(1, 50, 300, "float32", head_dim, value_dim)
        result = attend(q, k, v, dtype="float32")
        for tile in (64, 128):
            monkeypatch.setattr(contract, "key_tile", lambda _, tile=tile: tile)
            check = assert_both_same if tile == 64 else assert_both_differ
            check(attend(q, k, v, dtype="float32"), result)

    @every_dtype
    @pytest.mark.parametrize("dims", [(16, 24), (192, 128)])
    def test_rows_alone(self, dims: tuple[int, int], dtype: str) -> None:
        q, k, v = qkv(2, 70, 90, dtype, *dims)
        out, lse = attend(q, k, v, dtype=dtype)
        for row in (0, 3, 63, 64, 69):
            rows = np.s_[1:, :, row : row + 1]
            keys = np.s_[1:, :, : 90 - 70 + row + 1]
            assert_both_same(attend(q[rows], k[keys], v[keys], "full", dtype), (out[rows], lse[rows]), dtype)
        fewer = np.s_[1:, :, :89]
        assert_both_differ(attend(q[rows], k[fewer], v[fewer], "full", dtype), (out[rows], lse[rows]))


PADDINGS = ("right", "left", "holes", "one", "none", "all")


def padding(kind: str, keys: int) -> Any:
    """A row of a key padding mask, True where a key exists."""
    place = np.arange(keys)
    return {
        "right": place < keys * 2 // 3,
        "left": place >= keys // 3,
        "holes": np.random.default_rng(keys).random(keys) < 0.6,
        "one": place == keys // 2,
        "none": place < 0,
        "all": place >= 0,
    }[kind]


class TestKeyPaddingMask:
    @staticmethod
    def compacted(arrays: list[Bits], exists: Any, mask: str, dtype: str) -> Both:
        """Every row alone with the keys that it sees."""
        q, k, v = arrays
        len_q, len_k = q.shape[2], k.shape[2]
        results: list[list[Both]] = []
        for b in range(len(q)):
            seen = [len_k if mask == "full" else max(0, i + 1 + len_k - len_q) for i in range(len_q)]
            keys = [np.flatnonzero(exists[b, :n]) for n in seen]
            alone = [(q[b : b + 1, :, i : i + 1], k[b : b + 1, :, n], v[b : b + 1, :, n]) for i, n in enumerate(keys)]
            results.append([attend(*one, "full", dtype) for one in alone])
        out, lse = (np.concatenate([np.concatenate([r[i] for r in rows], 2) for rows in results]) for i in (0, 1))
        return out, lse

    @staticmethod
    def masked(arrays: list[Bits], exists: Any, mask: str, dtype: str, padded: Sequence[float] = (np.nan,)) -> Both:
        q, k, v = (x.copy() for x in arrays)
        words = round_to_bits(np.array(padded, np.float32), dtype)
        for x in (k, v):
            places = np.broadcast_to(~exists[:, None, :, None], x.shape)
            x[places] = np.resize(words, np.count_nonzero(places))
        return attend(q, k, v, mask, dtype, key_padding_mask=import_tensor(exists, "exists"))

    @both_masks
    @pytest.mark.parametrize(
        ("dtype", "len_q", "len_k"), [("float16", 5, 700), ("bfloat16", 70, 70), ("float32", 40, 20)]
    )
    def test_equals_the_compacted_sequence(self, dtype: str, len_q: int, len_k: int, mask: str) -> None:
        arrays = qkv(len(PADDINGS), len_q, len_k, dtype)
        exists = np.array([padding(kind, len_k) for kind in PADDINGS])
        expected = self.compacted(arrays, exists, mask, dtype)
        for padded in ((np.nan,), (np.inf, -np.inf), (6e4, -6e4), (0.0,)):
            assert_both_same(self.masked(arrays, exists, mask, dtype, padded), expected, dtype)
        nothing = PADDINGS.index("none")
        assert not expected[0][nothing].any()
        assert (expected[1][nothing].view(np.float32) == -np.inf).all()
        assert_both_differ(self.masked(arrays, np.roll(exists, 1, axis=1), mask, dtype, (0.0,)), expected)

    @both_masks
    def test_strides(self, mask: str) -> None:
        arrays = qkv(3, 5, 200)
        wide = np.random.default_rng(1).random((400, 3)) < 0.5
        exists = wide.T[:, ::-2]
        assert_both_same(
            self.masked(arrays, exists, mask, "float16"),
            self.masked(arrays, np.ascontiguousarray(exists), mask, "float16"),
        )
        assert_both_differ(
            self.masked(arrays, exists, mask, "float16"), self.masked(arrays, wide.T[:, 1::2], mask, "float16")
        )

    @every_dtype
    @both_masks
    def test_against_gold(self, mask: str, dtype: str) -> None:
        arrays = qkv(len(PADDINGS), 9, 600, dtype)
        exists = np.array([padding(kind, 600) for kind in PADDINGS])
        gold = gold_attention(*doubles(dtype, *arrays), mask, 0.25, exists)
        assert_accurate(self.masked(arrays, exists, mask, dtype), gold, dtype)


class TestPartials:
    @staticmethod
    def shard(arrays: list[Bits], chunks: tuple[int, int], mask: str, dtype: str) -> list[Bits]:
        """out, reference and sums of the chunks first <= c < end, computed from their keys alone."""
        q, k, v = arrays
        total = k.shape[2]
        first, end = chunks
        keys = slice(contract.chunk_start(first), contract.chunk_start(end))
        problem = Problem(*(tensor(x, dtype) for x in (q, k[:, :, keys], v[:, :, keys])), mask, 0.25, "bhsd")
        rows = (end - first, *q.shape[:3])
        parts = [poison(shape, 4) for shape in ((*rows, v.shape[3]), rows, rows)]
        reference.forward_partials(problem, *(tensor(x, "float32") for x in parts), first, total)
        return parts

    @staticmethod
    def combined(parts: list[list[Bits]], dtype: str) -> Both:
        out, lse = poison(parts[0][0].shape[1:], WORD[dtype]().itemsize), poison(parts[0][1].shape[1:], 4)
        partials = [tuple(tensor(x, "float32") for x in part) for part in parts]
        reference.combine(partials, tensor(out, dtype), tensor(lse, "float32"))
        return out, lse

    @both_masks
    @pytest.mark.parametrize(
        ("dtype", "len_q", "len_k"), [("float16", 70, 1024), ("bfloat16", 600, 1100), ("float32", 20, 5000)]
    )
    def test_any_cut_gives_what_forward_gives(self, dtype: str, len_q: int, len_k: int, mask: str) -> None:
        arrays = qkv(1, len_q, len_k, dtype)
        expected = attend(*arrays, mask, dtype)
        chunks = contract.chunk_count(len_k)
        for cuts in ([0, chunks], [0, 1, chunks], list(range(chunks + 1))):
            parts = [self.shard(arrays, span, mask, dtype) for span in pairwise(cuts)]
            assert_both_same(self.combined(parts, dtype), expected, dtype)
        if dtype == "float32":  # 16 bits hide the order
            assert_both_differ(self.combined(parts[::-1], dtype), expected)
        assert_both_differ(self.combined(parts[:-1], dtype), expected)

    def test_chunks_that_no_row_sees(self) -> None:
        """600 causal rows over 1100 keys: the first ones end before the last chunk."""
        out, largest, sums = self.shard(qkv(1, 600, 1100), (2, 3), "causal", "float16")
        unseen = np.s_[:, :, :, : 1024 - 500]
        assert (largest[unseen].view(np.float32) == np.finfo(np.float32).min).all()
        assert not out[unseen].any()
        assert not sums[unseen].any()
        assert (sums[:, :, :, 1024 - 500 :].view(np.float32) > 0).all()

    def test_rows_without_keys(self) -> None:
        arrays = qkv(1, 9, 4)
        expected = attend(*arrays)
        assert_both_same(self.combined([self.shard(arrays, (0, 1), "causal", "float16")], "float16"), expected)
        assert (expected[1].view(np.float32)[:, :, :5] == -np.inf).all()


def test_chunk_starts_and_counts() -> None:
    starts = [0]
    while starts[-1] < 200_000:
        starts.append(starts[-1] + contract.chunk_length(starts[-1]))
    assert [contract.chunk_start(i) for i in range(len(starts))] == starts
    for i, start in enumerate(starts):
        assert (contract.chunk_count(start), contract.chunk_count(start + 1)) == (i, i + 1)
