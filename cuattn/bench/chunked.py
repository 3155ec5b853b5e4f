"""Chunked prefill on a GPU: new tokens of one sequence over its cache, beside the peers, after a check.

32 query and 8 key heads, D 128, bf16, causal; the first problem is a whole prefill, and ratio_to_prefill a rate over
cuattn's there. Timed only if the last rows agree with float64 and all have the bits that they have without a cache.
Work and roof are those of `cuattn bench prefill`. Timed by CUDA events around a CUDA graph of calls in a row that go
through several caches, together three times as large as the L2 cache. Of a peer without figures the note says why.
Exit status 1 if a problem was refused.
"""

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import cuattn
from cuattn.bench import answers, peers, timing
from cuattn.bench.options import add_effort, add_files, add_providers, chosen_peers
from cuattn.bench.rates import RATES, Recorder, attention_flop, rows_of
from cuattn.bench.results import PROVENANCE, within
from cuattn.bench.runs import begin, finish
from cuattn.bench.timing import Times

COLUMNS = (
    *("figure", "pass", "dtype", "mask", "head_dim", "value_dim", "length", "keys", "batch", "heads", "kv_heads"),
    *("provider", *RATES, "ratio_to_prefill", "note", *PROVENANCE),
)
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


def why_refused(chunk: Chunk, inputs: Sequence[Any], gold: Any, references: Mapping[str, Any]) -> str | None:
    """None if the last rows are accurate, and all have the bits that they have without a cache."""
    q, k, v, lengths = inputs
    out = cuattn.attention_kvcache(q, k, v, lengths)
    if not answers.same_bits(out, cuattn.attention(q, k, v, chunk.mask, layout="bshd")):
        return "other bits than without a cache"
    return answers.why_inaccurate(last_rows(out.transpose(1, 2)), gold, references, chunk.dtype)


def last_rows(x: Any) -> Any:
    """Of an array (B, H, length, columns)."""
    return x[:, :, -CHECKED_ROWS:]


def heads_first(inputs: Sequence[Any]) -> list[Any]:
    """q, k and v as (B, H, length, columns), views."""
    return [x.transpose(1, 2) for x in inputs[:3]]


def attempt(chunk: Chunk, sets: Sequence[Sequence[Any]], names: Sequence[str]) -> tuple[peers.Attempt, str | None]:
    """What the peers made of it, and why cuattn's answer is refused, or None."""
    tried = peers.attempt(names, lambda peer: [peer.prepare(*heads_first(x), chunk.mask) for x in sets])
    q, k, v = heads_first(sets[0])
    gold, _, unfused = answers.gold_and_unfused(last_rows(q), k, v, chunk.mask)
    return tried, why_refused(chunk, sets[0], gold, answers.references(tried, last_rows, gold, unfused))


def measure(chunk: Chunk, names: Sequence[str], repeats: int) -> tuple[Times, dict[str, str]] | str:
    """(times over caches that are not in the L2 cache, why peers have none), or why there are none at all."""
    first = chunk.inputs()
    one_cache = sum(cache.nbytes for cache in first[1:3])
    sets = [first, *(chunk.inputs() for _ in range(1, math.ceil(timing.COLD_BYTES / one_cache)))]
    tried, refused = attempt(chunk, sets, names)
    if refused:
        return refused
    own = [partial(cuattn.attention_kvcache, *x) for x in sets]
    times, uncaptured = timing.time_graphs({"cuattn": own, **tried.calls}, repeats)
    return times, tried.reasons | uncaptured


def add_options(parser: argparse.ArgumentParser) -> None:
    add_providers(parser, peers.FORWARD)
    add_effort(parser, repeats=9)
    add_files(parser)


def run(options: argparse.Namespace) -> int:
    results = begin(options, COLUMNS)
    recorder = Recorder(results, options.repeats)
    roof = recorder.add_roof("first")
    prefill = None  # FLOP/ms of the first chunk, which is a whole sequence
    for chunk in within(options.seconds, Chunk.default_set()):
        measured = recorder.accepted(chunk, measure(chunk, chosen_peers(options), options.repeats))
        if measured is None:
            continue
        times, reasons = measured
        rows = rows_of({"figure": "chunk", "pass": "first", **asdict(chunk)}, times, chunk.flop, roof, reasons)
        ms = timing.medians(times)
        prefill = prefill or chunk.flop / ms["cuattn"]
        for row in rows:
            if row["provider"] in ms:
                row["ratio_to_prefill"] = f"{chunk.flop / ms[row['provider']] / prefill:.3f}"
        recorder.add(chunk, rows, ("prefill",))
    finish(options, results)
    return int(recorder.refused > 0)
