"""Decode on a GPU: one query row a sequence over a cache, beside torch SDPA, after a check of what is timed.

Problems: sequences of one length, contiguous caches (B, length, Hkv, D) or pages in random order, with automatic splits
and, for a few problems, fixed numbers of splits. A problem is timed only if the first and the last sequence agree with
float64 as well as the peers' do, and have the same bits alone, with other splits and, where there are pages, without.

Bytes: keys and values that exist, 2 Hkv (D + Dv) of each token, and 2 Hq (D + Dv) of each sequence for q and out: what
must be read and written at least. GB/s is bytes / time; percent_of_sum and percent_of_copy are its shares of a sum,
which only reads, and of a copy, of which both reads and writes count, measured in the same run. Timed by CUDA events
around a CUDA graph of calls in a row that go through several caches, together three times as large as the L2 cache (one
cache may be that large already); the providers take turns in each repeat. A time is the median of the repeats, beside
the smallest and the largest.

Providers: "cuattn" with automatic splits, "cuattn 4 splits", "cuattn portable" as in forward.py, and torch SDPA's
backends; of one that cannot compute or capture the problem, the note says why. ratio_to_best_fixed: automatic over the
best fixed number of splits. Figures: "decode"; "host call", the time from Python's entry to its return without
synchronisation; "roof", sum and copy. Exit status 1 if a problem was refused.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import families
import peers
import timing
from common import PROVENANCE, begin, within
from timing import Call, Times

import cuattn

COLUMNS = (
    *("figure", "dtype", "head_dim", "batch", "length", "heads", "kv_heads", "page_size", "provider"),
    *(*timing.COLUMNS, "gigabytes", "gb_per_s", "percent_of_sum", "percent_of_copy"),
    *(f"ratio_to_{peer}" for peer in peers.SDPA),
    *("ratio_to_best_fixed", "note", *PROVENANCE),
)
PEERS = ("flash", "cudnn", "efficient")
SPLITS = (1, 4, 16, 64)
ROOF_BYTES = 4 << 30
Heads = tuple[int, int]  # of queries, and of keys


@dataclass(frozen=True)
class Problem:
    batch: int
    length: int
    heads: int
    kv_heads: int
    page_size: int = 0  # 0: contiguous
    dtype: str = "bfloat16"
    head_dim: int = 128

    @property
    def cache_bytes(self) -> int:
        return self.batch * self.length * self.kv_heads * 2 * self.head_dim * 2

    @property
    def bytes(self) -> int:
        return self.cache_bytes + self.batch * self.heads * 2 * self.head_dim * 2

    def inputs(self, device: str = "cuda") -> dict[str, Any]:
        """The arguments of `cuattn.attention_kvcache`."""
        import torch

        dtype, page = getattr(torch, self.dtype), self.page_size
        pages = math.ceil(self.length / page) if page else 0
        outer = (self.batch * pages, page) if page else (self.batch, self.length)
        q = torch.randn(self.batch, 1, self.heads, self.head_dim, device=device, dtype=dtype)
        caches = [
            torch.randn(*outer, self.kv_heads, self.head_dim, device=device, dtype=dtype) for _ in ("keys", "values")
        ]
        lengths = torch.full((self.batch,), self.length, device=device, dtype=torch.int32)
        given = {"q": q, "k_cache": caches[0], "v_cache": caches[1], "cache_lengths": lengths}
        if page:
            order = torch.randperm(self.batch * pages, device=device, dtype=torch.int32)
            given["block_table"] = order.reshape(self.batch, pages)
        return given

    def __str__(self) -> str:
        kind = f"pages of {self.page_size:3}" if self.page_size else "contiguous"
        return f"{self.batch:3} x {self.length:6}, {self.heads}/{self.kv_heads} heads, {kind:12}"


def problems(
    batches: Sequence[int], lengths: Sequence[int], heads: Sequence[Heads], page_sizes: Sequence[int], most_bytes: float
) -> list[Problem]:
    """Those whose cache is at most ``most_bytes``; paged ones for the first heads and medium batches only."""
    contiguous = [Problem(b, n, *h) for h, b, n in itertools.product(heads, batches, lengths)]
    paged = [
        replace(p, page_size=size)
        for p, size in itertools.product(contiguous, page_sizes)
        if (p.heads, p.kv_heads) == heads[0] and p.batch < 256 and p.length in (8192, 32768)
    ]
    first_heads_first = sorted([*contiguous, *paged], key=lambda p: (p.heads, p.kv_heads) != heads[0])
    return [p for p in first_heads_first if p.cache_bytes <= most_bytes]


def sequences(given: dict[str, Any], items: Sequence[int]) -> tuple[Any, Any, Any]:
    """q (items, Hq, 1, D), keys and values (items, Hkv, length, D) of some sequences, gathered from their pages."""
    q, table = given["q"][items], given.get("block_table")

    def gathered(cache: Any) -> Any:
        if table is None:
            return cache[items]
        return cache[table[items].long()].flatten(1, 2)[:, : int(given["cache_lengths"][0])]

    q, k, v = (x.transpose(1, 2) for x in (q, gathered(given["k_cache"]), gathered(given["v_cache"])))
    return q, k, v


def why_refused(problem: Problem, given: dict[str, Any], outputs: dict[str, Any]) -> str | None:
    """None if cuattn's answer is accurate and invariant; ``outputs`` (B, Hq, 1, D) are the peers'."""
    out = cuattn.attention_kvcache(**given).transpose(1, 2)
    for splits in (1, 3):
        if not peers.same_bits(cuattn.attention_kvcache(**given, num_splits=splits).transpose(1, 2), out):
            return f"other bits with num_splits={splits}"
    for name, function in families.portable(cuattn.attention_kvcache).items():
        if not peers.same_bits(function(**given).transpose(1, 2), out):
            return f"other bits than {name}"
    items = sorted({0, problem.batch - 1})
    q, k, v = sequences(given, items)
    for number, item in enumerate(items):
        one = slice(number, number + 1)
        if not peers.same_bits(cuattn.attention(q[one], k[one], v[one]), out[item : item + 1]):
            return f"other bits for sequence {item} alone"
    gold, _, unfused = peers.gold_and_unfused(q, k, v, "full")
    references = {name: result[items] for name, result in outputs.items()} | {"unfused": unfused}
    return peers.why_inaccurate(out[items], gold, references, problem.dtype)


def calls_of(function: Callable[..., Any], sets: Sequence[dict[str, Any]], **options: Any) -> list[Call]:
    return [lambda given=given: function(**given, **options) for given in sets]  # type: ignore[misc]


def peer_call(q: Any, k_cache: Any, v_cache: Any, cache_lengths: Any) -> Any:
    return peers.sdpa(q.transpose(1, 2), k_cache.transpose(1, 2), v_cache.transpose(1, 2), "full")


def measure(problem: Problem, splits: Sequence[int], repeats: int) -> tuple[Times, dict[str, str]] | str:
    """(times, why other peers have none), or why there are none at all."""
    given = problem.inputs()
    outputs: dict[str, Any] = {}
    reasons = dict.fromkeys(PEERS, "does not know pages")
    if not problem.page_size:
        q, k, v = (given[name].transpose(1, 2) for name in ("q", "k_cache", "v_cache"))
        outputs, reasons = peers.attempt(q, k, v, "full", PEERS)
    refused = why_refused(problem, given, outputs)
    if refused:
        return refused
    sets = [given, *(problem.inputs() for _ in range(1, math.ceil(timing.COLD_BYTES / problem.cache_bytes)))]
    providers = {"cuattn": calls_of(cuattn.attention_kvcache, sets)}
    providers |= {f"cuattn {n} splits": calls_of(cuattn.attention_kvcache, sets, num_splits=n) for n in splits}
    others = families.portable(cuattn.attention_kvcache)
    providers |= {name: calls_of(function, sets) for name, function in others.items()}
    providers |= {name: calls_of(peer_call, sets) for name in outputs}
    times, uncaptured = timing.time_graphs(providers, repeats)
    return times, reasons | uncaptured


def measure_roof(repeats: int) -> tuple[Times, dict[str, int]]:
    """Times of a sum and of a copy, and the bytes of each."""
    import torch

    x = torch.randn(ROOF_BYTES // 4, device="cuda")
    y = torch.empty_like(x)
    return timing.time_in_turns({"sum": x.sum, "copy": lambda: y.copy_(x)}, repeats), {
        "sum": ROOF_BYTES,
        "copy": 2 * ROOF_BYTES,
    }


def measure_host(problem: Problem) -> Times:
    """Also of a call that appends a token in place, at the same position each time."""
    import torch

    given = problem.inputs()
    new = torch.randn(problem.batch, 1, problem.kv_heads, problem.head_dim, device="cuda").to(given["q"].dtype)
    before = {"cache_lengths": given["cache_lengths"] - 1, "k_new": new, "v_new": new}
    providers: dict[str, Call] = {
        "cuattn": lambda: cuattn.attention_kvcache(**given),
        "cuattn append": lambda: cuattn.attention_kvcache(**given | before),
    }
    if not problem.page_size:
        providers["flash"] = lambda: peer_call(**given)
    return timing.time_host(providers)


def rows_of(
    labels: dict[str, Any], times: Times, size: dict[str, int] | None = None, roofs: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """CSV rows, a provider each. ``size``: bytes of a call; ``roofs``: bytes a millisecond."""
    rows = []
    ms = timing.medians(times)
    fixed = [value for name, value in ms.items() if name.endswith("splits")]
    for name, samples in times.items():
        row = {**labels, "provider": name, **timing.figures(samples), **timing.ratios(name, times)}
        if size:
            rate = size[name] / ms[name]
            row |= {"gigabytes": f"{size[name] / 1e9:.4f}", "gb_per_s": f"{rate / 1e6:.0f}"}
            row |= {f"percent_of_{roof}": f"{100 * rate / value:.1f}" for roof, value in (roofs or {}).items()}
        if fixed and name == "cuattn":
            row["ratio_to_best_fixed"] = f"{min(fixed) / ms[name]:.3f}"
        rows.append(row)
    return rows


def line_of(row: dict[str, Any]) -> str:
    """One row for a reader."""
    if row.get("note"):
        return str(row["note"])
    line = f"{1e3 * float(row['ms']):9.1f} us ({1e3 * float(row['ms_min']):.1f} to {1e3 * float(row['ms_max']):.1f})"
    if "gb_per_s" in row:
        line += f" {row['gb_per_s']:>5} GB/s"
    if "percent_of_sum" in row:
        line += f" {row['percent_of_sum']:>5} % of sum {row['percent_of_copy']:>5} % of copy"
    others = (*peers.SDPA, "best_fixed")
    return line + "".join(f" {float(row['ratio_to_' + p]):.2f} x {p}" for p in others if f"ratio_to_{p}" in row)


def head_counts(text: str) -> Heads:
    """ "32/8": 32 query heads, 8 key heads."""
    heads, _, kv_heads = text.partition("/")
    return int(heads), int(kv_heads or heads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 2048, 8192, 32768, 131072], help="of a cache")
    parser.add_argument("--heads", type=head_counts, nargs="+", metavar="HQ/HKV", default=[(32, 8), (32, 32), (64, 8)])
    parser.add_argument("--page-size", type=int, nargs="*", default=[16, 256])
    parser.add_argument("--splits", type=int, nargs="*", default=SPLITS, help="fixed numbers to compare with")
    parser.add_argument("--gigabytes", type=float, default=100, help="largest cache (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=300, help="no new problem after them (default: %(default)s)")
    options, results = begin(parser, COLUMNS)
    import torch

    def add(problem: Problem | str, rows: Sequence[dict[str, Any]]) -> None:
        results.add(rows)
        for row in rows:
            print(f"{problem} {row['provider']:16} {line_of(row)}", flush=True)

    times, size = measure_roof(options.repeats)
    add("roof", rows_of({"figure": "roof", "dtype": "float32"}, times, size))
    roofs = {name: size[name] / ms for name, ms in timing.medians(times).items()}
    refused = 0
    todo = problems(options.batch, options.length, options.heads, options.page_size, 1e9 * options.gigabytes)
    for problem in within(options.seconds, todo):
        compared = (problem.heads, problem.kv_heads) == options.heads[0] and not problem.page_size
        result = measure(problem, options.splits if compared else (), options.repeats)
        torch.cuda.empty_cache()  # the next problem's caches have other sizes
        if isinstance(result, str):
            refused += 1
            print(f"{problem} REFUSED: {result}", flush=True)
            continue
        times, reasons = result
        labels = {"figure": "decode", **asdict(problem)}
        add(problem, rows_of(labels, times, dict.fromkeys(times, problem.bytes), roofs))
        add(problem, [{**labels, "provider": name, "note": reason} for name, reason in reasons.items()])
    heads, kv_heads = options.heads[0]
    for page_size in (0, 16):
        tiny = Problem(1, 1024, heads, kv_heads, page_size)
        add(f"host call {tiny}", rows_of({"figure": "host call", **asdict(tiny)}, measure_host(tiny)))
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
