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

Providers: "cuattn" with automatic splits, "cuattn 4 splits", "cuattn portable" as in `cuattn bench prefill`, and the
peers of --providers; of one that cannot compute or capture the problem, the note says why. ratio_to_best_fixed:
automatic over the best fixed number of splits. Figures: "decode"; "roof", sum and copy. Exit status 1 if a problem was
refused.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import cuattn
from cuattn.bench import answers, families, peers, timing
from cuattn.bench.options import add_effort, add_files, add_providers, chosen_peers, positive
from cuattn.bench.peers import Attempt, Call
from cuattn.bench.results import PROVENANCE, notes, within
from cuattn.bench.runs import begin, finish
from cuattn.bench.timing import Times

COLUMNS = (
    *("figure", "dtype", "head_dim", "batch", "length", "heads", "kv_heads", "page_size", "provider"),
    *(*timing.COLUMNS, "gigabytes", "gb_per_s", "percent_of_sum", "percent_of_copy"),
    *(*timing.RATIOS, "ratio_to_best_fixed", "note", *PROVENANCE),
)
SPLITS = (1, 4, 16, 64)
ROOF_BYTES = 4 << 30
NO_ROOFS: Mapping[str, float] = MappingProxyType({})
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


def why_refused(
    problem: Problem, given: dict[str, Any], checked: Sequence[int], gold: Any, references: Mapping[str, Any]
) -> str | None:
    """None if cuattn's answer is invariant and, for the ``checked`` sequences, as accurate as others' answers."""
    out = cuattn.attention_kvcache(**given).transpose(1, 2)
    for splits in (1, 3):
        if not answers.same_bits(cuattn.attention_kvcache(**given, num_splits=splits).transpose(1, 2), out):
            return f"other bits with num_splits={splits}"
    for name, function in families.portable(cuattn.attention_kvcache).items():
        if not answers.same_bits(function(**given).transpose(1, 2), out):
            return f"other bits than {name}"
    for item in checked:
        if not answers.same_bits(cuattn.attention(*sequences(given, [item])), out[item : item + 1]):
            return f"other bits for sequence {item} alone"
    return answers.why_inaccurate(out[checked], gold, references, problem.dtype)


def attempt(problem: Problem, sets: Sequence[dict[str, Any]], names: Sequence[str]) -> tuple[Attempt, str | None]:
    """What the peers made of it, and why cuattn's answer is refused, or None; the first and the last sequence are
    compared with float64.
    """
    tried = peers.attempt(names, lambda peer: [peer.decode(**given) for given in sets])
    checked = sorted({0, problem.batch - 1})
    gold, _, unfused = answers.gold_and_unfused(*sequences(sets[0], checked), "full")
    references = answers.references(tried, lambda result: result[checked], gold, unfused)
    return tried, why_refused(problem, sets[0], checked, gold, references)


def calls_of(function: Callable[..., Any], sets: Sequence[dict[str, Any]], **options: Any) -> list[Call]:
    return [partial(function, **given, **options) for given in sets]


def measure(
    problem: Problem, names: Sequence[str], splits: Sequence[int], repeats: int
) -> tuple[Times, dict[str, str]] | str:
    """(times, why peers have none), or why there are none at all."""
    first = problem.inputs()
    sets = [first, *(problem.inputs() for _ in range(1, math.ceil(timing.COLD_BYTES / problem.cache_bytes)))]
    tried, refused = attempt(problem, sets, names)
    if refused:
        return refused
    providers: dict[str, Sequence[Call]] = {"cuattn": calls_of(cuattn.attention_kvcache, sets)}
    providers |= {f"cuattn {n} splits": calls_of(cuattn.attention_kvcache, sets, num_splits=n) for n in splits}
    portable = families.portable(cuattn.attention_kvcache)
    providers |= {name: calls_of(function, sets) for name, function in portable.items()}
    times, uncaptured = timing.time_graphs({**providers, **tried.calls}, repeats)
    return times, tried.reasons | uncaptured


def measure_roof(repeats: int) -> tuple[Times, dict[str, int]]:
    """Times of a sum and of a copy, and the bytes of each."""
    import torch

    x = torch.randn(ROOF_BYTES // 4, device="cuda")
    y = torch.empty_like(x)
    return timing.time_in_turns({"sum": x.sum, "copy": lambda: y.copy_(x)}, repeats), {
        "sum": ROOF_BYTES,
        "copy": 2 * ROOF_BYTES,
    }


def rows_of(
    labels: dict[str, Any], times: Times, size: Mapping[str, int], roofs: Mapping[str, float] = NO_ROOFS
) -> list[dict[str, Any]]:
    """CSV rows, a provider each. ``size``: bytes of a call; ``roofs``: bytes a millisecond."""
    rows = []
    ms = timing.medians(times)
    fixed = [value for name, value in ms.items() if name.endswith("splits")]
    for name, samples in times.items():
        row = {**labels, "provider": name, **timing.figures(samples), **timing.ratios(name, times)}
        rate = size[name] / ms[name]
        row |= {"gigabytes": f"{size[name] / 1e9:.4f}", "gb_per_s": f"{rate / 1e6:.0f}"}
        row |= {f"percent_of_{roof}": f"{100 * rate / value:.1f}" for roof, value in roofs.items()}
        if fixed and name == "cuattn":
            row["ratio_to_best_fixed"] = f"{min(fixed) / ms[name]:.3f}"
        rows.append(row)
    return rows


def line_of(row: Mapping[str, Any]) -> str:
    """One row for a reader."""
    if row.get("note"):
        return f"not measured: {row['note']}"
    line = f"{1e3 * float(row['ms']):9.1f} us ({1e3 * float(row['ms_min']):.1f} to {1e3 * float(row['ms_max']):.1f})"
    line += f" {row['gb_per_s']:>5} GB/s"
    if "percent_of_sum" in row:
        line += f" {row['percent_of_sum']:>5} % of sum {row['percent_of_copy']:>5} % of copy"
    return f"{line} {timing.shown_ratios(row, ('best_fixed',))}"


def head_counts(text: str) -> Heads:
    """ "32/8": 32 query heads, 8 key heads."""
    first, _, second = text.partition("/")
    heads, kv_heads = int(first), int(second or first)
    if not 0 < kv_heads <= heads or heads % kv_heads:
        raise argparse.ArgumentTypeError(f"got {text}, expected a multiple of the key heads over the key heads")
    return heads, kv_heads


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument(
        "--length", type=positive, nargs="+", default=[1024, 2048, 8192, 32768, 131072], help="of a cache"
    )
    parser.add_argument("--heads", type=head_counts, nargs="+", metavar="HQ/HKV", default=[(32, 8), (32, 32), (64, 8)])
    parser.add_argument("--page-size", type=positive, nargs="*", default=[16, 256])
    parser.add_argument("--splits", type=positive, nargs="*", default=SPLITS, help="fixed numbers to compare with")
    parser.add_argument("--gigabytes", type=float, default=100, help="largest cache (default: %(default)s)")
    add_providers(parser, peers.FORWARD)
    add_effort(parser, repeats=7)
    add_files(parser)


def run(options: argparse.Namespace) -> int:
    results = begin(options, COLUMNS)
    import torch

    def add(problem: Problem | str, rows: Sequence[dict[str, Any]]) -> None:
        results.add(rows)
        for row in rows:
            print(f"{problem} {row['provider']:16} {line_of(row)}", flush=True)

    times, size = measure_roof(options.repeats)
    roofs = {name: size[name] / ms for name, ms in timing.medians(times).items()}
    add("roof", rows_of({"figure": "roof", "dtype": "float32"}, times, size))
    refused = 0
    todo = problems(options.batch, options.length, options.heads, options.page_size, 1e9 * options.gigabytes)
    for problem in within(options.seconds, todo):
        compared = (problem.heads, problem.kv_heads) == options.heads[0] and not problem.page_size
        measured = measure(problem, chosen_peers(options), options.splits if compared else (), options.repeats)
        torch.cuda.empty_cache()  # the next problem's caches have other sizes
        if isinstance(measured, str):
            refused += 1
            print(f"{problem} REFUSED: {measured}", flush=True)
            continue
        times, reasons = measured
        labels = {"figure": "decode", **asdict(problem)}
        rows = rows_of(labels, times, dict.fromkeys(times, problem.bytes), roofs)
        add(problem, [*rows, *notes(labels, reasons)])
    finish(options, results)
    return int(refused > 0)
