"""Forward attention on a GPU beside torch SDPA's flash and cuDNN backends, after a check of what is timed.

Problems: as many sequences as make --tokens tokens, 2048 / head_dim heads, as many keys as queries. A problem is timed
only if the output agrees with float64 as well as the peers' does and parts of it computed alone have the same bits.

Work: 4 B H Lq Lk D operations, half of it for causal; TFLOP/s is work / time, percent_of_roof its share of an 8192^3
bf16 matrix product measured in the same run. Bytes at least: 4 D (B H Lq + B Hkv Lk) for q, k, v and out of 2 bytes an
element, 4 B H Lq for the LSE: 0.27 GB at 16K tokens, 0.06 ms on an H200, so products bound the time from 1K keys on.
Timed by CUDA events around calls in a row that go through several sets of inputs, together larger than the L2 cache;
the providers take turns in each repeat. A time is the median of the repeats, beside the smallest and the largest.

Providers: "cuattn" is the public call, "cuattn launch" the launch alone with everything prepared, "flash" and "cudnn"
are torch SDPA. Figures: "forward"; "host call", the time from Python's entry to its return for a tiny problem without
synchronisation; "roof", the matrix product. Pass "again" repeats the first problem and the roof at the end: the drift.
Exit status 1 if a problem was refused.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peers
from common import PROVENANCE, attention_flop, provenance, write_csv

import cuattn
from cuattn import config as configs

COLUMNS = (
    *("figure", "pass", "dtype", "mask", "head_dim", "length", "batch", "heads", "provider"),
    *("ms", "ms_min", "ms_max", "repeats", "tflops", "percent_of_roof", "ratio_to_flash", "ratio_to_cudnn"),
    *PROVENANCE,
)
ROOF_SIZE = 8192
#: One timed stretch lasts about this long, so that the resolution of events does not count.
STRETCH_MS = 4.0
HOST_CALLS = 1000
Call = Callable[[], Any]
Times = dict[str, list[float]]  # of each provider, milliseconds of one call


@dataclass(frozen=True)
class Problem:
    dtype: str
    mask: str
    head_dim: int
    length: int
    batch: int
    heads: int

    @property
    def flop(self) -> float:
        return attention_flop(self.batch, self.heads, self.length, self.length, self.head_dim, self.mask)

    def inputs(self, device: str = "cuda") -> tuple[Any, Any, Any]:
        import torch

        shape = self.batch, self.heads, self.length, self.head_dim
        q, k, v = (torch.randn(shape, device=device, dtype=getattr(torch, self.dtype)) for _ in range(3))
        return q, k, v

    def __str__(self) -> str:
        return f"{self.dtype} d{self.head_dim} {self.mask:6} {self.batch:3} x {self.length}"


def problems(dtypes: Sequence[str], head_dims: Sequence[int], lengths: Sequence[int], tokens: int) -> list[Problem]:
    return [
        Problem(dtype, mask, head_dim, length, max(1, tokens // length), 2048 // head_dim)
        for dtype, head_dim, mask, length in itertools.product(dtypes, head_dims, ("causal", "full"), lengths)
    ]


def why_refused(problem: Problem, inputs: tuple[Any, Any, Any], outputs: dict[str, Any]) -> str | None:
    """None if cuattn's answer is accurate and batch-invariant on this problem; ``outputs`` are the peers' answers."""
    q, k, v = inputs
    out = cuattn.attention(q, k, v, problem.mask)
    gold, _, unfused = peers.gold_and_unfused(q, k, v, problem.mask)
    reason = peers.why_inaccurate(out, gold, {**outputs, "unfused": unfused}, problem.dtype)
    return reason or peers.why_not_invariant(cuattn.attention, q, k, v, problem.mask, out)


def prepared_launch(q: Any, k: Any, v: Any, mask: str) -> Call:
    """The launch alone: checked, planned, with outputs in place."""
    import torch

    from cuattn.checks import check_attention
    from cuattn.interop import import_tensor
    from cuattn.launch import device_architecture, launch_kernel
    from cuattn.schedule import plan_forward

    outputs = torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)
    problem = check_attention(q, k, v, mask, None, None, "bhsd", None)
    index = problem.query.device.index
    config = configs.select_config(problem.head_dim, mask, problem.query.dtype, device_architecture(index))
    out, lse = (import_tensor(x, "out") for x in outputs)
    plan = plan_forward(config, problem, out, lse)
    stream = torch.cuda.current_stream().cuda_stream

    def launch() -> Any:
        launch_kernel(config, plan.grid, plan.shared_bytes, plan.params, index, stream)
        return outputs  # which keeps them alive

    return launch


def providers_of(problem: Problem, sets: Sequence[tuple[Any, Any, Any]], peer_names: Sequence[str]) -> dict[str, Call]:
    """Functions of which every call takes the next of the sets of inputs."""

    def rotating(calls: list[Call]) -> Call:
        turns = itertools.cycle(calls)
        return lambda: next(turns)()

    def each(function: Callable[..., Any]) -> Call:
        return rotating([lambda qkv=qkv: function(*qkv, problem.mask) for qkv in sets])  # type: ignore[misc]

    return {
        "cuattn": each(cuattn.attention),
        "cuattn launch": rotating([prepared_launch(*qkv, problem.mask) for qkv in sets]),
        **{name: each(peers.sdpa) for name in peer_names},
    }


def backend_of(provider: str) -> contextlib.AbstractContextManager[None]:
    return peers.only(provider) if provider in peers.SDPA else contextlib.nullcontext()


def time_in_turns(providers: dict[str, Call], repeats: int) -> Times:
    """Each provider ``repeats`` times, in turns."""
    import torch

    def stretch(name: str, count: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with backend_of(name):
            start.record()
            for _ in range(count):
                providers[name]()
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / count

    counts = {}
    for name in providers:
        stretch(name, 3)  # compiles, loads, warms up
        counts[name] = max(2, round(STRETCH_MS / stretch(name, 3)))
    times: Times = {name: [] for name in providers}
    for _ in range(repeats):
        for name in providers:
            times[name].append(stretch(name, counts[name]))
    return times


def measure_forward(problem: Problem, sets: int, repeats: int) -> Times | str:
    """The times, or why there are none."""
    inputs = [problem.inputs() for _ in range(sets)]
    outputs = peers.available(*inputs[0], problem.mask, lambda line: print(f"{problem}: {line}", flush=True))
    reason = why_refused(problem, inputs[0], outputs)
    return reason or time_in_turns(providers_of(problem, inputs, list(outputs)), repeats)


def measure_roof(repeats: int) -> Times:
    """An 8192^3 matrix product in bf16."""
    import torch

    a, b = (torch.randn(ROOF_SIZE, ROOF_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return time_in_turns({"matmul": lambda: a @ b}, repeats)


def measure_host(problem: Problem) -> Times:
    """From a call's entry to its return, HOST_CALLS times; the problem is so small that the device keeps up."""
    import torch

    inputs = problem.inputs()
    names = list(peers.available(*inputs, problem.mask, lambda line: print(f"host call: {line}", flush=True)))
    times: Times = {}
    for name, call in providers_of(problem, [inputs], names).items():
        with backend_of(name):
            for _ in range(100):
                call()
            torch.cuda.synchronize()
            times[name] = []
            for _ in range(HOST_CALLS):
                start = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - start))
            torch.cuda.synchronize()
    return times


def rows_of(
    labels: dict[str, Any], times: Times, flop: float | None = None, roof: float | None = None
) -> list[dict[str, Any]]:
    """CSV rows, a provider each. Of ``flop`` operations a call also the rate, and its share of ``roof`` in FLOP/ms.

    A ratio is a provider's speed over a peer's: above 1 is faster.
    """
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    rows = []
    for name, samples in times.items():
        row = {**labels, "provider": name, "repeats": len(samples)}
        for column, value in (("ms", medians[name]), ("ms_min", min(samples)), ("ms_max", max(samples))):
            row[column] = f"{value:.5f}"
        if flop:
            row["tflops"] = f"{flop / medians[name] / 1e9:.1f}"
        if flop and roof:
            row["percent_of_roof"] = f"{100 * flop / medians[name] / roof:.1f}"
        row |= {f"ratio_to_{peer}": f"{medians[peer] / medians[name]:.3f}" for peer in peers.SDPA if peer in medians}
        rows.append(row)
    return rows


def line_of(row: dict[str, Any]) -> str:
    """One row for a reader: rate and share of the roof, or the time where no work is counted."""
    spread = f"({row['ms_min']} to {row['ms_max']} ms)"
    if "tflops" not in row:
        return f"{1e3 * float(row['ms']):.1f} us {spread}"
    ratios = " ".join(f"{float(row['ratio_to_' + p]):.2f} x {p}" for p in peers.SDPA if f"ratio_to_{p}" in row)
    return f"{row['tflops']:>6} TFLOP/s {row['percent_of_roof']:>5} % of roof {ratios} {spread}"


def print_summary(rows: Sequence[dict[str, Any]]) -> None:
    """TFLOP/s of cuattn, flash and cuDNN: a line for each dtype, head dim and mask, a column for each length."""
    rates: dict[tuple[Any, ...], dict[int, dict[str, str]]] = {}
    for row in rows:
        if row["figure"] == "forward" and row["pass"] == "first":
            lengths = rates.setdefault((row["dtype"], row["head_dim"], row["mask"]), {})
            lengths.setdefault(row["length"], {})[row["provider"]] = f"{float(row['tflops']):.0f}"
    print("\nTFLOP/s by length: cuattn / " + " / ".join(peers.SDPA))
    for (dtype, head_dim, mask), lengths in rates.items():
        cells = [f"{n}: " + " / ".join(r.get(p, "-") for p in ("cuattn", *peers.SDPA)) for n, r in lengths.items()]
        print(f"{dtype} d{head_dim:<3} {mask:6} " + "   ".join(cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, nargs="+", choices=configs.HEAD_DIMS, default=[64, 128])
    parser.add_argument("--length", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--dtype", nargs="+", choices=configs.DTYPES, default=["bfloat16"])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in a batch (default: %(default)s)")
    parser.add_argument("--sets", type=int, default=2, help="sets of inputs to go through (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    options = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        parser.error("needs a CUDA device that torch can use")
    torch.manual_seed(0)
    facts = provenance()
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    rows: list[dict[str, Any]] = []

    def add(figure: str, again: str, problem: Problem | None, times: Times, **work: float) -> None:
        size = asdict(problem) if problem else {"dtype": "bfloat16", "length": ROOF_SIZE}
        for row in rows_of({"figure": figure, "pass": again, **size}, times, **work):
            rows.append({**row, **facts})
            print(f"{problem or figure} {again:5} {row['provider']:13} {line_of(row)}", flush=True)
        if options.csv:  # each time, so that a run that is stopped leaves what it has
            write_csv(options.csv, rows, COLUMNS)

    measured = measure_roof(options.repeats)
    roof_flop = 2.0 * ROOF_SIZE**3
    roof = roof_flop / statistics.median(measured["matmul"])
    add("roof", "first", None, measured, flop=roof_flop, roof=roof)
    refused = 0
    todo = problems(options.dtype, options.head_dim, options.length, options.tokens)
    for problem, again in [*((p, "first") for p in todo), (todo[0], "again")]:
        result = measure_forward(problem, options.sets, options.repeats)
        if isinstance(result, str):
            refused += 1
            print(f"{problem} REFUSED: {result}", flush=True)
        else:
            add("forward", again, problem, result, flop=problem.flop, roof=roof)
    add("roof", "again", None, measure_roof(options.repeats), flop=roof_flop, roof=roof)
    for head_dim in options.head_dim:
        tiny = Problem(options.dtype[0], "causal", head_dim, 16, 1, 2)
        add("host call", "first", tiny, measure_host(tiny))
    print_summary(rows)
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
