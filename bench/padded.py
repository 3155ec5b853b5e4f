"""Padded batches on a GPU beside the same work without padding, after a check of what is timed.

Problems: B sequences of L query rows and places for keys, of which a random number, on average a given share, holds a
key: from the first on ("right", and "lengths" by kv_lengths instead of a mask), up to the last ("left") or anywhere
("holes"). "packed" is `cuattn.attention_varlen` with the same query rows and the keys that exist.

With a full mask, and causal with padding on the left, packed and padded rows see the same keys: all bits are compared.
Causal rows of the others see other keys, and together more of them: there the last rows are compared, which see all. So
ratio_to_packed, which is to be at most 1.15, is time for each pair of query row and visible key over that of "packed".
Timed by CUDA events around a CUDA graph of calls in a row; the forms take turns in each repeat. A time is the median of
the repeats, beside the smallest and the largest. Exit status 1 if a problem was refused or a ratio is larger.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import cuattn
from cuattn.bench import answers, timing
from cuattn.bench.options import add_files
from cuattn.bench.results import PROVENANCE, within
from cuattn.bench.runs import begin

COLUMNS = (
    *("dtype", "mask", "head_dim", "batch", "heads", "length", "share", "form"),
    *(*timing.COLUMNS, "tflops", "ratio_to_packed", *PROVENANCE),
)
FORMS = ("right", "lengths", "left", "holes")
LARGEST_RATIO = 1.15
#: Calls of one graph.
CALLS = 8


@dataclass(frozen=True)
class Problem:
    dtype: str
    mask: str
    head_dim: int
    batch: int
    heads: int
    length: int
    share: float

    def __str__(self) -> str:
        return f"{self.dtype} d{self.head_dim:<3} {self.mask:6} {self.batch:2} x {self.length:4}, {self.share:.0%} keys"


@dataclass(frozen=True)
class Batch:
    """q, k, v (B, H, L, D), and for each form which places hold a key, bool (B, L)."""

    problem: Problem
    q: Any
    k: Any
    v: Any
    places: dict[str, Any]

    @staticmethod
    def make(problem: Problem, device: str = "cuda") -> "Batch":
        import torch

        shape = problem.batch, problem.heads, problem.length, problem.head_dim
        q, k, v = (torch.randn(shape, device=device, dtype=getattr(torch, problem.dtype)) for _ in range(3))
        spread = 2 * min(problem.share, 1 - problem.share)
        shares = problem.share + spread * (torch.rand(problem.batch, 1, device=device) - 0.5)
        counts = (shares * problem.length).int().clamp(1, problem.length)
        place = torch.arange(problem.length, device=device)
        right = place < counts
        ranks = torch.rand(problem.batch, problem.length, device=device).argsort(1).argsort(1)
        left = place >= problem.length - counts
        return Batch(problem, q, k, v, {"right": right, "lengths": right, "left": left, "holes": ranks < counts})

    def padded(self, form: str) -> Callable[[], Any]:
        """A call that returns (B, H, L, D)."""
        places = self.places[form]
        options = {"kv_lengths": places.sum(1).int()} if form == "lengths" else {"key_padding_mask": places}
        return partial(cuattn.attention, self.q, self.k, self.v, self.problem.mask, **options)

    def packed(self, form: str) -> Callable[[], Any]:
        """A call that returns (B * L, H, D)."""
        import torch

        places = self.places[form]
        counts = places.sum(1)
        k, v = (x.transpose(1, 2)[places] for x in (self.k, self.v))
        rows = torch.full_like(counts, self.problem.length)
        cu_q, cu_k = (torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int() for lengths in (rows, counts))
        q = self.q.transpose(1, 2).flatten(0, 1).contiguous()
        return partial(cuattn.attention_varlen, q, k, v, cu_q, cu_k, self.problem.mask)

    def pairs(self, form: str) -> int:
        """Query rows and keys that they see, of one head; of "packed" those of the keys at the left's places."""
        length = self.problem.length
        if self.problem.mask == "full":
            return int(self.places["right"].sum()) * length
        return int(self.places["left" if form == "packed" else form].cumsum(1).sum())

    def why_refused(self) -> str | None:
        """None if each form's rows have the bits of the packed rows that see the same keys."""
        for form in FORMS:
            padded = self.padded(form)()
            expected = self.packed(form)().unflatten(0, padded.shape[:1] + padded.shape[2:3]).transpose(1, 2)
            same_keys = self.problem.mask == "full" or form == "left"
            rows = slice(None) if same_keys else slice(-1, None)
            if not answers.same_bits(padded[:, :, rows], expected[:, :, rows]):
                return f"other bits than packed: {form}"
        return None


def problems(head_dims: Sequence[int], shapes: Sequence[tuple[int, int]], shares: Sequence[float]) -> list[Problem]:
    return [
        Problem("bfloat16", mask, head_dim, batch, 2048 // head_dim, length, share)
        for head_dim, mask, (batch, length), share in itertools.product(head_dims, ("full", "causal"), shapes, shares)
    ]


def measure(problem: Problem, repeats: int) -> list[dict[str, Any]] | str:
    """CSV rows, a form each, or why there are none."""
    batch = Batch.make(problem)
    reason = batch.why_refused()
    if reason:
        return reason
    calls = {"packed": batch.packed("left"), **{form: batch.padded(form) for form in FORMS}}
    times, _ = timing.time_graphs({form: [call] * CALLS for form, call in calls.items()}, repeats)
    return rows_of(problem, times, {form: batch.pairs(form) for form in times})


def rows_of(problem: Problem, times: timing.Times, pairs: dict[str, int]) -> list[dict[str, Any]]:
    """``pairs``: of each form, query rows and keys that they see, of one head."""
    ms = timing.medians(times)
    rows = []
    for form, samples in times.items():
        rate = pairs[form] * problem.heads * 4 * problem.head_dim / ms[form]
        ratio = (ms[form] / pairs[form]) / (ms["packed"] / pairs["packed"])
        row = {**asdict(problem), "form": form, **timing.figures(samples)}
        rows.append(row | {"tflops": f"{rate / 1e9:.1f}", "ratio_to_packed": f"{ratio:.3f}"})
    return rows


def shape(text: str) -> tuple[int, int]:
    """ "8x512": 8 sequences of 512 rows."""
    batch, _, length = text.partition("x")
    return int(batch), int(length)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument(
        "--shape", type=shape, nargs="+", metavar="BxL", default=[(8, 512), (32, 512), (8, 2048), (8, 4096)]
    )
    parser.add_argument("--share", type=float, nargs="+", default=[0.5, 0.9], help="of the places that hold a key")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=120, help="no new problem after them (default: %(default)s)")
    add_files(parser, plot=False)
    parser.set_defaults(usage_error=parser.error)
    options = parser.parse_args()
    results = begin(options, COLUMNS)
    bad = 0
    for problem in within(options.seconds, problems(options.head_dim, options.shape, options.share)):
        result = measure(problem, options.repeats)
        if isinstance(result, str):
            bad += 1
            print(f"{problem} REFUSED: {result}", flush=True)
            continue
        results.add(result)
        ratios = {row["form"]: float(row["ratio_to_packed"]) for row in result}
        slow = [form for form, ratio in ratios.items() if ratio > LARGEST_RATIO]
        bad += bool(slow)
        cells = "  ".join(f"{form} {ratio:.3f}" for form, ratio in ratios.items() if form != "packed")
        verdict = f"  OVER {LARGEST_RATIO}: {', '.join(slow)}" if slow else ""
        print(f"{problem}: packed {1e3 * float(result[0]['ms']):.1f} us; times it: {cells}{verdict}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
