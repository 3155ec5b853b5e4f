"""What FlashInfer documents of two classes, on the CPU, for the tests of what calls them."""

from types import ModuleType
from typing import Any

import torch
from documented_flash_attn import documented
from torch import Tensor


def _parts(x: Tensor, starts: Tensor) -> list[Tensor]:
    return [x[first:end] for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]


class _Wrapper:
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        *,
        causal: bool = False,
        **dtypes: torch.dtype,
    ) -> None:
        assert set(dtypes) == {"q_data_type", "kv_data_type"}
        self.starts = qo_indptr, kv_indptr
        self.heads = (num_qo_heads, head_dim_qk), (num_kv_heads, head_dim_qk), (num_kv_heads, head_dim_vo)
        self.causal = causal

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert tuple(tuple(x.shape[1:]) for x in (q, k, v)) == self.heads
        assert all(x.is_contiguous() for x in (q, k, v))
        cut = zip(_parts(q, self.starts[0]), _parts(k, self.starts[1]), _parts(v, self.starts[1]), strict=True)
        return torch.cat([documented(*one, self.causal)[0] for one in cut]).to(q.dtype)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **dtypes: torch.dtype,
    ) -> None:
        assert set(dtypes) == {"q_data_type", "kv_data_type"}
        assert {x.dtype for x in (indptr, indices, last_page_len)} == {torch.int32}
        self.pages = _parts(indices, indptr)
        self.last = last_page_len.tolist()
        self.heads = num_qo_heads, head_dim
        self.page = page_size, num_kv_heads, head_dim

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        assert tuple(q.shape[1:]) == self.heads
        assert tuple(paged_kv_cache[0].shape[1:]) == self.page
        results = []
        for row, pages, last in zip(q, self.pages, self.last, strict=True):
            length = (len(pages) - 1) * self.page[0] + last
            k, v = (cache[pages.long()].flatten(0, 1)[:length] for cache in paged_kv_cache)
            results.append(documented(row[None], k, v, False)[0])
        return torch.cat(results).to(q.dtype)


def module() -> Any:
    made: Any = ModuleType("flashinfer")
    made.BatchPrefillWithRaggedKVCacheWrapper = BatchPrefillWithRaggedKVCacheWrapper
    made.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper
    return made
