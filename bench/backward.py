"""Backward attention on a GPU beside torch SDPA, after a check of what is timed; or with --memory what it holds.

As many sequences as make --tokens tokens, 2048 / head_dim heads, as many keys as queries, for each of --dtype,
--head-dim and --length. A problem is timed only if the gradients of the last sequence's first head agree with torch's
autograd in float64 as well as the peers' do, and if all gradients have the same bits again, through autograd, and where
the last sequence or the first head is computed alone.

Figures: "backward", the gradients alone: `cuattn.attention_backward`, and of the peers torch.autograd.grad on a
retained graph; "forward+backward", both through autograd: `cuattn.attention` of tensors that require gradients. Work:
2.5 and 3.5 times the forward pass's of bench/forward.py, the convention of other published figures (2.5: five products
of matrices where the forward pass has two). TFLOP/s is work / time, percent_of_roof its share of an 8192^3 bf16 matrix
product measured in the same run. Timed like bench/forward.py, by CUDA events around calls in a row that go through
several sets of inputs. Pass "again" repeats the first problem at the end: the drift.

Providers: "cuattn"; torch SDPA's backends; "flash_deterministic" is its flash backend under
torch.use_deterministic_algorithms, the one that promises the same bits in each run.

--memory: a forward and backward pass of one sequence, 4 heads, D 128, of 16K and of 64K tokens: the peak of
torch.cuda.max_memory_allocated above what was allocated before, inputs and results included, in bytes for each token.
cuattn's is refused if that of 64K is more than 4 x 1.1 times that of 16K. Exit status 1 if anything was refused.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import forward
import peers
import timing
from common import PROVENANCE, begin, within
from forward import Problem
from timing import Call, Times

import cuattn
from cuattn import config as configs
from cuattn.testing import LIMITS
from cuattn.testing.gradient_accuracy import GradientError

COLUMNS = (
    *("figure", "pass", "dtype", "mask", "head_dim", "value_dim", "length", "batch", "heads", "provider"),
    *(*timing.COLUMNS, "tflops", "percent_of_roof"),
    *(f"ratio_to_{peer}" for peer in (*peers.SDPA, peers.DETERMINISTIC)),
    *("peak_bytes", "bytes_per_token", *PROVENANCE),
)
#: Work in units of the forward pass's.
WORK = {"backward": 2.5, "forward+backward": 3.5}
MEMORY_LENGTHS = 16384, 65536
#: What more than in proportion to the length may be held.
MEMORY_MARGIN = 1.1
Three = tuple[Any, Any, Any]


@dataclass(frozen=True)
class Given:
    """q, k, v and the gradient of the output."""

    q: Any
    k: Any
    v: Any
    dout: Any
    mask: str

    @staticmethod
    def make(problem: Problem, device: str = "cuda") -> "Given":
        import torch

        q, k, v = problem.inputs(device)
        dout = torch.randn(*q.shape[:3], problem.value_dim, device=device, dtype=q.dtype)
        return Given(q, k, v, dout, problem.mask)

    def __getitem__(self, index: Any) -> "Given":
        """Some sequences and heads, of which there are as many of keys as of queries."""
        return Given(*(x[index] for x in (self.q, self.k, self.v, self.dout)), self.mask)

    def backward(self) -> Callable[[], Three]:
        """`cuattn.attention_backward` with the forward pass behind it."""
        qkv = self.q, self.k, self.v
        out, lse = cuattn.attention(*qkv, self.mask, return_lse=True)
        return lambda: cuattn.attention_backward(self.dout, *qkv, out, lse, self.mask)

    def retained(self, attention: Callable[..., Any]) -> Callable[[], Three]:
        """The gradients that torch computes, with the forward pass behind it."""
        import torch

        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        out = attention(*leaves, self.mask)
        return lambda: torch.autograd.grad(out, leaves, self.dout, retain_graph=True)

    def both(self, attention: Callable[..., Any]) -> Three:
        """A forward and a backward pass."""
        return self.retained(attention)()


def why_refused(given: Given, others: dict[str, Three]) -> str | None:
    """None if cuattn's gradients are accurate, invariant and autograd's; ``others`` are the peers' gradients."""
    call = given.backward()
    gradients = call()
    last, first = (slice(-1, None),), (slice(None), slice(0, 1))
    computed = {
        "the whole problem again": (call(), ()),
        "autograd": (given.both(cuattn.attention), ()),
        "the last sequence": (given[last].backward()(), last),
        "the first head": (given[first].backward()(), first),
    }
    for where, (alone, part) in computed.items():
        for name, actual, whole in zip(("dq", "dk", "dv"), alone, gradients, strict=True):
            if not peers.same_bits(actual, whole[part]):
                return f"{name}: other bits for {where}"
    some = slice(-1, None), slice(0, 1)
    part = given[some]
    gold, unfused = peers.gold_and_unfused_gradients(part.dout, part.q, part.k, part.v, given.mask)
    for i, name in enumerate(("dq", "dk", "dv")):
        references = [unfused[i], *(result[i][some] for result in others.values())]
        reason = why_inaccurate(gradients[i][some], gold[i], references)
        if reason:
            return f"{name}: {reason}"
    return None


def why_inaccurate(gradient: Any, gold: Any, references: Sequence[Any]) -> str | None:
    """None if a gradient of a square problem is as accurate as the worst reference, by the rules of cuattn.testing."""
    dtype = str(gradient.dtype).removeprefix("torch.")
    actual, expected, *others = (x.double().cpu().numpy() for x in (gradient, gold, *references))
    errors = [GradientError.of(actual, expected, other, dtype, terms=gold.shape[2]) for other in others]
    ratio = min(error.ratio for error in errors)
    if not ratio <= LIMITS[dtype].gradient_ratio:
        return f"relative L2 error {errors[0].error:.3g}, {ratio:.3g} times that of the peers"
    element = min(error.worst_element for error in errors)
    return None if element <= 1 else f"an element's error is {element:.3g} times what is allowed"


def providers_of(figure: str, sets: Sequence[Given], peer_names: Sequence[str]) -> dict[str, Call]:
    """Functions of which every call takes the next of the sets of inputs."""
    attentions = {"cuattn": cuattn.attention, **dict.fromkeys(peer_names, peers.sdpa)}
    if figure == "forward+backward":
        return {
            name: timing.rotating([partial(given.both, attention) for given in sets])
            for name, attention in attentions.items()
        }
    providers = {"cuattn": timing.rotating([given.backward() for given in sets])}
    for name in peer_names:
        with peers.backend_of(name):
            providers[name] = timing.rotating([given.retained(peers.sdpa) for given in sets])
    return providers


def measure(problem: Problem, sets: int, repeats: int, device: str = "cuda") -> dict[str, Times] | str:
    """The times by figure, or why there are none."""
    inputs = [Given.make(problem, device) for _ in range(sets)]
    calls = {name: partial(inputs[0].both, peers.sdpa) for name in peers.GRADIENTS[problem.dtype]}
    others, reasons = peers.attempt_all(calls)
    for name, reason in reasons.items():
        print(f"{problem}: without SDPA {name}: {reason}", flush=True)
    refused = why_refused(inputs[0], others)
    names = list(others)
    del others
    return refused or {figure: timing.time_in_turns(providers_of(figure, inputs, names), repeats) for figure in WORK}


def peak_of(attention: Callable[..., Any], problem: Problem) -> int:
    """The most bytes that tensors hold at a time in a forward and backward pass, with those that it starts from."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    Given.make(problem).both(attention)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


def measure_memory(
    dtype: str, mask: str, head_dim: int = 128, heads: int = 4, peak: Callable[..., int] = peak_of
) -> tuple[list[dict[str, Any]], str | None]:
    """CSV rows, and why cuattn's memory is not in proportion to the length, or None."""
    attentions = {"cuattn": cuattn.attention, **dict.fromkeys(peers.GRADIENTS[dtype], peers.sdpa)}
    rows = []
    peaks: dict[str, list[int]] = {}
    for length in MEMORY_LENGTHS:
        problem = Problem(dtype, mask, head_dim, head_dim, length, 1, heads)
        calls = {name: partial(peak, attention, problem) for name, attention in attentions.items()}
        measured = {"cuattn": calls.pop("cuattn")()}
        others, reasons = peers.attempt_all(calls)
        for name, reason in reasons.items():
            print(f"{problem}: without SDPA {name}: {reason}", flush=True)
        for name, size in (measured | others).items():
            peaks.setdefault(name, []).append(size)
            labels = {"figure": "memory", "pass": "first", **asdict(problem), "provider": name}
            rows.append(labels | {"peak_bytes": size, "bytes_per_token": f"{size / length:.1f}"})
    short, long = peaks["cuattn"]
    allowed = MEMORY_MARGIN * short * MEMORY_LENGTHS[1] / MEMORY_LENGTHS[0]
    return rows, None if long <= allowed else f"{long} bytes at {MEMORY_LENGTHS[1]} tokens, allowed {allowed:.0f}"


def run_memory(options: argparse.Namespace, add: Callable[..., None]) -> int:
    """The number of problems that were refused."""
    refused = 0
    for dtype, mask in itertools.product(options.dtype, configs.MASKS):
        # what kernels and libraries allocate once is not a problem's
        measure_memory(dtype, mask)
        rows, reason = measure_memory(dtype, mask)
        add(f"{dtype} d128 {mask:6}", rows)
        refused += reason is not None
        if reason:
            print(f"{dtype} {mask} REFUSED: {reason}", flush=True)
    return refused


def line_of(row: dict[str, Any]) -> str:
    if row["figure"] == "memory":
        return (
            f"{row['length']:6} tokens: {int(row['peak_bytes']) / 1e6:.1f} MB, {row['bytes_per_token']} bytes a token"
        )
    return forward.line_of(row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="measure memory, and no time")
    parser.add_argument(
        "--head-dim", type=forward.head_dims, nargs="+", metavar="D[:DV]", default=[(64, 64), (128, 128), (256, 256)]
    )
    parser.add_argument("--length", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--dtype", nargs="+", choices=configs.DTYPES, default=["bfloat16"])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in a batch (default: %(default)s)")
    parser.add_argument("--sets", type=int, default=2, help="sets of inputs to go through (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=300, help="no new problem after them (default: %(default)s)")
    options, results = begin(parser, COLUMNS)

    def add(problem: Problem | str, rows: Sequence[dict[str, Any]]) -> None:
        results.add(rows)
        for row in rows:
            print(f"{problem} {row['figure']:16} {row['pass']:5} {row['provider']:19} {line_of(row)}", flush=True)

    if options.memory:
        return int(run_memory(options, add) > 0)
    times = forward.measure_roof(options.repeats)
    flop = 2.0 * forward.ROOF_SIZE**3
    roof = flop / timing.medians(times)["matmul"]
    labels = {"figure": "roof", "pass": "first", "dtype": "bfloat16", "length": forward.ROOF_SIZE}
    add("roof", forward.rows_of(labels, times, flop, roof))
    todo = forward.problems(options.dtype, options.head_dim, options.length, options.tokens)
    refused = 0
    for problem, again in within(options.seconds, [*((p, "first") for p in todo), (todo[0], "again")]):
        result = measure(problem, options.sets, options.repeats)
        if isinstance(result, str):
            refused += 1
            print(f"{problem} REFUSED: {result}", flush=True)
            continue
        for figure, times in result.items():
            labels = {"figure": figure, "pass": again, **asdict(problem)}
            add(problem, forward.rows_of(labels, times, WORK[figure] * problem.flop, roof))
    for figure in WORK:
        forward.print_summary(results.rows, figure, peers.GRADIENTS)
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
