"""`cuattn.compat.flash_attn` over caches: appended in place, in pages, chosen by an index."""

from typing import Any

import pytest
import torch
from documented_flash_attn import assert_close, documented, starts
from torch import Tensor
from training import DTYPES, normal

from cuattn.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from cuattn.testing import BitwiseMismatch, assert_bitwise_equal

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both = pytest.mark.parametrize("causal", [False, True])
CACHED, NEW, ROOM = [0, 13, 30], 4, 40


class Cache:
    """Three sequences with CACHED keys, contiguous or in pages, and NaN in every other place."""

    def __init__(self, dtype: torch.dtype = torch.float32, page_size: int | None = None) -> None:
        self.q = normal(3, NEW, 4, 16, dtype=dtype)
        self.k, self.v = (normal(3, ROOM, 2, d, seed=d, dtype=dtype) for d in (16, 24))
        self.lengths = torch.tensor(CACHED, dtype=torch.int32)
        kept = (torch.arange(ROOM) < self.lengths[:, None])[..., None, None]
        self.options: dict[str, Any] = {}
        self.caches = tuple(torch.where(kept, x, torch.nan) for x in (self.k, self.v))
        if page_size is not None:
            pages = ROOM // page_size
            order = torch.randperm(3 * pages, generator=torch.Generator().manual_seed(0))
            self.caches = tuple(x.reshape(3 * pages, page_size, 2, -1)[order] for x in self.caches)
            self.options["block_table"] = order.argsort().view(3, pages).int()

    def sequences(self, new: int) -> list[tuple[Tensor, Tensor]]:
        return [(k[: n + new], v[: n + new]) for k, v, n in zip(self.k, self.v, CACHED, strict=True)]

    def new(self, count: int) -> tuple[Tensor, ...]:
        """What stands behind the cached keys."""
        return tuple(
            torch.stack([part[n : n + count] for part, n in zip(x, CACHED, strict=True)]) for x in (self.k, self.v)
        )

    def check(self, results: tuple[Tensor, Tensor], new: int, causal: bool) -> None:
        """Against the documentation, and the bits of each sequence alone."""
        for b, (k, v) in enumerate(self.sequences(new)):
            got = tuple(x[b] for x in results)
            assert_close(got, documented(self.q[b], k, v, causal), self.q.dtype)
            assert_bitwise_equal(got[0], flash_attn_func(self.q[None, b], k[None], v[None], causal=causal)[0])


def with_lse(cache: Cache, *new: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = flash_attn_with_kvcache(
        cache.q, *cache.caches, *new, return_softmax_lse=True, **cache.options, **options
    )
    assert lse.shape == (3, 4, NEW)
    return out, lse


@both
@every_dtype
@pytest.mark.parametrize("page_size", [None, 8, 20])
def test_a_cache_is_appended_to_in_place(page_size: int | None, dtype: torch.dtype, causal: bool) -> None:
    cache = Cache(dtype, page_size)
    cache.check(with_lse(cache, cache_seqlens=cache.lengths, causal=causal), 0, causal)
    cache.check(with_lse(cache, *cache.new(NEW), cache_seqlens=cache.lengths, causal=causal), NEW, causal)
    lengths = cache.lengths + NEW
    out = flash_attn_with_kvcache(
        cache.q, *cache.caches, cache_seqlens=lengths, causal=causal, num_splits=3, **cache.options
    )
    assert_bitwise_equal(out, with_lse(cache, cache_seqlens=lengths, causal=causal)[0])
    assert cache.lengths.tolist() == CACHED


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("page_size", [None, 8])
def test_as_many_new_keys_as_one_likes(page_size: int | None, count: int) -> None:
    cache = Cache(page_size=page_size)
    cache.check(with_lse(cache, *cache.new(count), cache_seqlens=cache.lengths, causal=True), count, True)


def test_one_length_for_all() -> None:
    cache = Cache()
    for caches, options in (((cache.k, cache.v), {}), ((cache.k[:, :30], cache.v[:, :30]), {"cache_seqlens": None})):
        out = flash_attn_with_kvcache(cache.q, *caches, **({"cache_seqlens": 30} | options), causal=True)
        assert_bitwise_equal(out, flash_attn_func(cache.q, cache.k[:, :30], cache.v[:, :30], causal=True))
    paged = Cache(page_size=8)
    pages = tuple(x.reshape(15, 8, 2, -1) for x in (paged.k, paged.v))
    table = torch.arange(15, dtype=torch.int32).view(3, 5)
    for lengths, end in ((None, 40), (30, 30)):
        out = flash_attn_with_kvcache(paged.q, *pages, cache_seqlens=lengths, block_table=table)
        assert_bitwise_equal(out, flash_attn_func(paged.q, paged.k[:, :end], paged.v[:, :end]))


def test_caches_chosen_by_an_index() -> None:
    cache = Cache()
    spare = tuple(torch.full((2, *x.shape[1:]), torch.nan) for x in cache.caches)
    order = torch.tensor([3, 0, 4], dtype=torch.int32)
    larger = tuple(torch.cat([x[1:2], y, x[::2]]) for x, y in zip(cache.caches, spare, strict=True))
    cache.caches = larger
    results = with_lse(cache, *cache.new(NEW), cache_seqlens=cache.lengths, cache_batch_idx=order, causal=True)
    cache.check(results, NEW, True)
    # the control: the first two sequences have each other's cache
    swapped = with_lse(cache, cache_seqlens=cache.lengths + NEW, cache_batch_idx=order[[1, 0, 2]], causal=True)
    with pytest.raises(BitwiseMismatch):
        assert_bitwise_equal(swapped[0], results[0])


@both
def test_packed_queries_read_pages(causal: bool) -> None:
    cache = Cache(page_size=8)
    rows = [3, 0, 6]
    q, bounds = normal(9, 4, 16), starts(rows)
    out, lse, probabilities = flash_attn_varlen_func(
        q, *cache.caches, bounds, starts(CACHED), 6, 30, causal=causal, return_attn_probs=True, **cache.options
    )
    assert probabilities is None
    pieces = [documented(x, k, v, causal) for x, (k, v) in zip(q.split(rows), cache.sequences(0), strict=True)]
    wanted = torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces], 1)
    assert_close((out, lse), wanted, torch.float32)
    with pytest.raises(NotImplementedError) as caught:
        flash_attn_varlen_func(q.requires_grad_(), *cache.caches, bounds, starts(CACHED), 6, 30, **cache.options)
    assert str(caught.value).startswith("block_table: got pages beside a tensor that requires grad, expected None or")
