"""Accuracy on a GPU of cuattn and of the fastest backends of torch SDPA: errors against float64 on the same inputs.

"unfused" is what a framework does without a fused kernel: scores and softmax in fp32, weights rounded to the dtype.
The LSE error is cuattn's alone. Short problems are square; the long ones have few query rows that see all 32768 keys.
Rounding a result to bf16 costs 1.65e-3 by itself, to fp16 2.1e-4, to fp32 2.5e-8. Exit status 1 if cuattn is less
accurate than the rules of cuattn.testing allow beside the worst of the others.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import cuattn
from cuattn import config as configs
from cuattn.bench import answers, peers
from cuattn.bench.options import add_files
from cuattn.bench.results import PROVENANCE
from cuattn.bench.runs import begin

#: Head dims that are measured, by dtype.
HEAD_DIMS = {"bfloat16": (64, 128, 256), "float16": (64, 128, 256), "float32": (64, 128)}
#: Standard deviations of queries and keys, mean of the values.
INPUTS = {
    "normal": (1.0, 1.0, 0.0),
    "q, k std 4": (4.0, 4.0, 0.0),
    "q std 8": (8.0, 1.0, 0.0),
    "q std 16": (16.0, 1.0, 0.0),
    "v mean 1": (1.0, 1.0, 1.0),
    "v mean 30": (1.0, 1.0, 30.0),
}
COLUMNS = (
    *("inputs", "dtype", "head_dim", "mask", "heads", "len_q", "len_k", "provider"),
    *("rel_l2", "bias", "max_error", "max_lse_error", *PROVENANCE),
)


@dataclass(frozen=True)
class Problem:
    inputs: str
    dtype: str
    head_dim: int
    mask: str
    heads: int
    len_q: int
    len_k: int

    def tensors(self, device: str = "cuda") -> tuple[Any, Any, Any]:
        import torch

        q_std, k_std, v_mean = INPUTS[self.inputs]
        shapes = [(1, self.heads, length, self.head_dim) for length in (self.len_q, self.len_k, self.len_k)]
        q, k, v = (torch.randn(shape, device=device) for shape in shapes)
        q, k, v = (x.to(getattr(torch, self.dtype)) for x in (q * q_std, k * k_std, v + v_mean))
        return q, k, v


def problems(length: int, long_rows: int, long_keys: int) -> Iterator[Problem]:
    variants = [(dtype, head_dim) for dtype, dims in HEAD_DIMS.items() for head_dim in dims]
    for (dtype, head_dim), inputs in itertools.product(variants, INPUTS):
        for mask in configs.MASKS:
            yield Problem(inputs, dtype, head_dim, mask, 4, length, length)
        yield Problem(inputs, dtype, head_dim, "full", 4, long_rows, long_keys)


def measure(problem: Problem, device: str = "cuda") -> tuple[list[dict[str, Any]], str | None]:
    """A CSV row for each provider, and why cuattn is not accurate, or None."""
    q, k, v = problem.tensors(device)
    gold, gold_lse, unfused = answers.gold_and_unfused(q, k, v, problem.mask)
    out, lse = cuattn.attention(q, k, v, problem.mask, return_lse=True)
    tried = peers.attempt(peers.FASTEST[problem.dtype], lambda peer: [peer.prepare(q, k, v, problem.mask)])
    for name, reason in tried.reasons.items():
        print(f"{problem}: without {name}: {reason}", flush=True)
    others = {**tried.results, "unfused": unfused}
    scale = float(gold.abs().mean())
    rows = [
        {
            **asdict(problem),
            "provider": name,
            "rel_l2": f"{answers.relative_error(result, gold):.4e}",
            "bias": f"{float(((result.double() - gold) * gold.sign()).mean()) / scale:.2e}",
            "max_error": f"{answers.largest_error(result, gold):.3e}",
        }
        for name, result in {"cuattn": out, **others}.items()
    ]
    rows[0]["max_lse_error"] = f"{answers.largest_error(lse, gold_lse):.2e}"
    return rows, answers.why_inaccurate(out, gold, others, problem.dtype)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="of the square problems (default: %(default)s)")
    parser.add_argument("--long-rows", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--long-keys", type=int, default=32768, help="(default: %(default)s)")
    add_files(parser, plot=False)
    parser.set_defaults(usage_error=parser.error)
    options = parser.parse_args()
    results = begin(options, COLUMNS)
    bad = 0
    for problem in problems(options.length, options.long_rows, options.long_keys):
        measured, reason = measure(problem)
        results.add(measured)
        errors = "  ".join(f"{row['provider']} {float(row['rel_l2']):.2e}" for row in measured)
        size = f"{problem.len_q} x {problem.len_k}"
        print(
            f"{problem.dtype} d{problem.head_dim:<3} {problem.mask:6} {size:12} {problem.inputs:10} {errors}",
            flush=True,
        )
        if reason:
            bad += 1
            print(f"  cuattn is NOT accurate: {reason}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
