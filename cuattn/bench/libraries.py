"""Peers beside torch SDPA, by their published interfaces. See `cuattn.bench.peers.Peer` for the two kinds of function.

FlexAttention is part of torch. The functions of flash-attn and FlashInfer follow the documentation of their 2.x and
0.2 interfaces and have not run yet: whatever they return is compared with float64 before it is timed.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

Call = Callable[[], Any]

#: Scratch memory that FlashInfer asks for, in bytes.
_WORKSPACE = 128 << 20
#: More shapes than a run of benchmarks has.
_SHAPES = 4096


def over_cache(prepare: Callable[..., Call]) -> Callable[..., Call]:
    """`Peer.decode` of a peer that takes whole arrays of keys and values, and no pages."""

    def decode(q: Any, k_cache: Any, v_cache: Any, cache_lengths: Any, block_table: Any = None) -> Call:
        if block_table is not None:
            raise ValueError("block_table: got pages, expected a contiguous cache")
        return prepare(*(x.transpose(1, 2) for x in (q, k_cache, v_cache)), "full")

    return decode


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    """FlexAttention without its kernel is a slow fallback, so it is compiled, for each shape anew."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return compiled


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Without it torch gives up after eight shapes, and does not let gradients be computed twice."""
    import torch._dynamo
    import torch._functorch.config

    with (
        torch._dynamo.config.patch(recompile_limit=_SHAPES, accumulated_recompile_limit=_SHAPES),
        torch._functorch.config.patch(donated_buffer=False),
    ):
        yield


@functools.lru_cache(maxsize=4)
def _causal_blocks(rows: int, keys: int, device: Any) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    first = keys - rows
    return create_block_mask(lambda b, h, row, key: key <= row + first, None, None, rows, keys, device=device)


def flex(q: Any, k: Any, v: Any, mask: str) -> Call:
    blocks = _causal_blocks(q.shape[2], k.shape[2], q.device) if mask == "causal" else None
    return functools.partial(compiled_flex(), q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])


def flash_attn(q: Any, k: Any, v: Any, mask: str) -> Call:
    from flash_attn import flash_attn_func

    tokens_first = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: flash_attn_func(*tokens_first, causal=mask == "causal").transpose(1, 2)


def flash_attn_decode(q: Any, k_cache: Any, v_cache: Any, cache_lengths: Any, block_table: Any = None) -> Call:
    from flash_attn import flash_attn_with_kvcache

    options = {"cache_seqlens": cache_lengths, "block_table": block_table}
    return lambda: flash_attn_with_kvcache(q, k_cache, v_cache, **options).transpose(1, 2)


def flashinfer(q: Any, k: Any, v: Any, mask: str) -> Call:
    import torch
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    if any(x.requires_grad for x in (q, k, v)):
        raise NotImplementedError("FlashInfer computes no gradients")
    batch, heads, rows, head_dim = q.shape
    starts = [torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length for length in (rows, k.shape[2])]
    packed = [x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v)]
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(_workspace(q.device), "NHD")
    wrapper.plan(
        *starts,
        heads,
        k.shape[1],
        head_dim,
        head_dim_vo=v.shape[3],
        causal=mask == "causal",
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    return lambda: wrapper.run(*packed).unflatten(0, (batch, rows)).transpose(1, 2)


def flashinfer_decode(q: Any, k_cache: Any, v_cache: Any, cache_lengths: Any, block_table: Any = None) -> Call:
    """A contiguous cache is one of a page for each sequence."""
    import torch
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    batch, page_size = q.shape[0], k_cache.shape[1]
    length = int(cache_lengths[0])  # the same for all
    pages = -(-length // page_size)
    table = torch.arange(batch, dtype=torch.int32, device=q.device) if block_table is None else block_table
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * pages
    last = torch.full((batch,), length - (pages - 1) * page_size, dtype=torch.int32, device=q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(_workspace(q.device), "NHD")
    wrapper.plan(
        starts,
        table.flatten(),
        last,
        q.shape[2],
        k_cache.shape[2],
        q.shape[3],
        page_size,
        q_data_type=q.dtype,
        kv_data_type=k_cache.dtype,
    )
    return lambda: wrapper.run(q[:, 0], (k_cache, v_cache))[:, :, None]


@functools.cache
def _workspace(device: Any) -> Any:
    """Shared by calls, of which one runs after another."""
    import torch

    return torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
