"""Chunked prefill: new tokens of a sequence over its cache, for bench/forward.py."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peers
import timing
from common import attention_flop
from timing import Times

import cuattn

#: Rows that are compared with float64, the last ones.
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Chunk:
    """The last ``length`` tokens of ``keys``, which all are in the cache."""

    length: int
    keys: int
    dtype: str = "bfloat16"
    mask: str = "causal"
    head_dim: int = 128
    value_dim: int = 128
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8

    @staticmethod
    def default_set() -> list["Chunk"]:
        """A whole prefill first, to compare with."""
        new = (64, 256, 512, 2048)
        return [Chunk(8192, 8192), *(Chunk(n, old + n) for old, n in itertools.product((8192, 65536), new))]

    @property
    def flop(self) -> float:
        lengths = self.length, self.keys
        return attention_flop(self.batch, self.heads, *lengths, self.head_dim, self.mask, self.value_dim)

    def inputs(self, device: str = "cuda") -> tuple[Any, Any, Any, Any]:
        """q (B, length, Hq, D), the caches (B, keys, Hkv, D) and (B, keys, Hkv, Dv), their lengths (B)."""
        import torch

        shapes = (
            (self.length, self.heads, self.head_dim),
            (self.keys, self.kv_heads, self.head_dim),
            (self.keys, self.kv_heads, self.value_dim),
        )
        dtype = getattr(torch, self.dtype)
        q, k, v = (torch.randn(self.batch, *shape, device=device, dtype=dtype) for shape in shapes)
        return q, k, v, torch.full((self.batch,), self.keys, device=device, dtype=torch.int32)

    def __str__(self) -> str:
        return f"{self.dtype} d{self.head_dim} chunk of {self.length:4} in {self.keys:5}"


def why_refused(chunk: Chunk, inputs: Sequence[Any]) -> str | None:
    """None if the last rows are accurate, and all have the bits that they have without a cache."""
    q, k, v, lengths = inputs
    out = cuattn.attention_kvcache(q, k, v, lengths)
    if not peers.same_bits(out, cuattn.attention(q, k, v, chunk.mask, layout="bshd")):
        return "other bits than without a cache"
    rows, keys, values, last = (x.transpose(1, 2) for x in (q[:, -CHECKED_ROWS:], k, v, out[:, -CHECKED_ROWS:]))
    gold, _, unfused = peers.gold_and_unfused(rows, keys, values, chunk.mask)
    return peers.why_inaccurate(last, gold, {"unfused": unfused}, chunk.dtype)


def measure_chunk(chunk: Chunk, repeats: int) -> Times | str:
    """The times of "cuattn", replayed from a CUDA graph over caches that are not in the L2 cache, or why none."""
    inputs = chunk.inputs()
    reason = why_refused(chunk, inputs)
    if reason:
        return reason
    one_cache = sum(cache.nbytes for cache in inputs[1:3])
    sets = [inputs, *(chunk.inputs() for _ in range(1, math.ceil(timing.COLD_BYTES / one_cache)))]
    calls = [lambda x=x: cuattn.attention_kvcache(*x) for x in sets]
    times, _ = timing.time_graphs({"cuattn": calls}, repeats)
    return times
