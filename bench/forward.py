"""Forward attention on a GPU beside torch SDPA, after a check of what is timed.

Three parts. "grid": as many sequences as make --tokens tokens, 2048 / head_dim heads, as many keys as queries, for each
of --dtype, --head-dim and --length. "others": the same for a few problems with large or two head dims and in fp32.
"chunks": new tokens of one sequence over a cache, 32 query and 8 key heads (bench/chunks.py). A problem is timed only
if the output agrees with float64 as well as the peers' does and parts of it computed alone have the same bits.

Work: 2 B H (D + Dv) operations for each query row and key that it sees; TFLOP/s is work / time, percent_of_roof its
share of an 8192^3 bf16 matrix product measured in the same run. Bytes at least, in 16 bits: 2 (D + Dv) (B H Lq + B Hkv
Lk) for q, k, v and out, 4 B H Lq for the LSE: 0.27 GB at 16K tokens, 0.06 ms on an H200, so products bound the time
from 1K keys on. Timed by CUDA events around calls in a row that go through several sets of inputs, together larger than
the L2 cache; the providers take turns in each repeat. A time is the median of the repeats, beside the smallest and the
largest.

Providers: "cuattn" is the public call, "cuattn launch" the launches alone with everything prepared, "cuattn portable"
the public call on the portable kernels where others run, with the same bits; the others are torch SDPA's backends.
Figures: "forward"; "chunk", with its rate over that of a whole prefill as ratio_to_prefill;
"host call", the time from Python's entry to its return for a tiny problem without synchronisation; "roof", the matrix
product. Pass "again" repeats the first problem and the roof at the end: the drift. Exit status 1 if a problem was
refused.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import families
import peers
import timing
from chunks import Chunk, measure_chunk
from common import PROVENANCE, attention_flop, begin, within
from timing import Call, Times

import cuattn
from cuattn import config as configs

COLUMNS = (
    *("figure", "pass", "dtype", "mask", "head_dim", "value_dim", "length", "keys", "batch", "heads", "kv_heads"),
    *("provider", *timing.COLUMNS, "tflops", "percent_of_roof", *(f"ratio_to_{peer}" for peer in peers.SDPA)),
    *("ratio_to_prefill", *PROVENANCE),
)
PARTS = ("grid", "others", "chunks")
ROOF_SIZE = 8192
HeadDims = tuple[int, int]  # of queries and keys, and of values


@dataclass(frozen=True)
class Problem:
    dtype: str
    mask: str
    head_dim: int
    value_dim: int
    length: int
    batch: int
    heads: int

    @property
    def flop(self) -> float:
        lengths = self.length, self.length
        return attention_flop(self.batch, self.heads, *lengths, self.head_dim, self.mask, self.value_dim)

    def inputs(self, device: str = "cuda") -> tuple[Any, Any, Any]:
        import torch

        shape = self.batch, self.heads, self.length
        dtype = getattr(torch, self.dtype)
        columns = self.head_dim, self.head_dim, self.value_dim
        q, k, v = (torch.randn(*shape, count, device=device, dtype=dtype) for count in columns)
        return q, k, v

    def __str__(self) -> str:
        values = f":{self.value_dim}" if self.value_dim != self.head_dim else ""
        return f"{self.dtype} d{self.head_dim}{values} {self.mask:6} {self.batch:3} x {self.length}"


def problems(
    dtypes: Sequence[str], head_dims: Sequence[HeadDims], lengths: Sequence[int], tokens: int
) -> list[Problem]:
    return [
        Problem(dtype, mask, *dims, length, max(1, tokens // length), 2048 // dims[0])
        for dtype, dims, mask, length in itertools.product(dtypes, head_dims, ("causal", "full"), lengths)
    ]


def other_problems(tokens: int) -> list[Problem]:
    return [
        *problems(["bfloat16"], [(256, 256)], [2048, 8192], tokens),
        *problems(["bfloat16"], [(192, 192), (192, 128)], [8192], tokens),
        *problems(["float32"], [(64, 64), (128, 128)], [2048], tokens),
    ]


def why_refused(problem: Problem, inputs: tuple[Any, Any, Any], outputs: dict[str, Any]) -> str | None:
    """None if cuattn's answer is accurate and batch-invariant on this problem; ``outputs`` are the peers' answers."""
    q, k, v = inputs
    out = cuattn.attention(q, k, v, problem.mask)
    gold, _, unfused = peers.gold_and_unfused(q, k, v, problem.mask)
    for name, function in families.portable(cuattn.attention).items():
        if not peers.same_bits(function(q, k, v, problem.mask), out):
            return f"other bits than {name}"
    reason = peers.why_inaccurate(out, gold, {**outputs, "unfused": unfused}, problem.dtype)
    return reason or peers.why_not_invariant(cuattn.attention, q, k, v, problem.mask, out)


def prepared_launches(q: Any, k: Any, v: Any, mask: str) -> Call:
    """The launches alone: checked, planned, with outputs and workspace in place."""
    import torch

    from cuattn.checks import check_attention
    from cuattn.interop import Tensor, import_tensor
    from cuattn.launch import device_architecture, launch_kernel, processor_count
    from cuattn.launches import Target
    from cuattn.schedule import plan_forward

    problem = check_attention(q, k, v, mask, None, None, "bhsd", None)
    query = problem.query
    index = query.device.index

    def allocate(shape: tuple[int, ...], dtype: str) -> Tensor:
        return query.framework.empty(shape, dtype, query.device, query)

    outputs = torch.empty(problem.out_shape, dtype=q.dtype, device=q.device), torch.empty(q.shape[:3], device=q.device)
    out, lse = (import_tensor(x, "out") for x in outputs)
    target = Target(device_architecture(index), processor_count(index))
    launches = plan_forward(problem, out, lse, target, allocate)  # which keep the memory that they touch alive
    stream = torch.cuda.current_stream().cuda_stream

    def launch() -> Any:
        for one in launches:
            launch_kernel(one, index, stream)
        return outputs

    return launch


def providers_of(problem: Problem, sets: Sequence[tuple[Any, Any, Any]], peer_names: Sequence[str]) -> dict[str, Call]:
    """Functions of which every call takes the next of the sets of inputs."""

    def each(function: Callable[..., Any]) -> Call:
        return timing.rotating([lambda qkv=qkv: function(*qkv, problem.mask) for qkv in sets])  # type: ignore[misc]

    return {
        "cuattn": each(cuattn.attention),
        "cuattn launch": timing.rotating([prepared_launches(*qkv, problem.mask) for qkv in sets]),
        **{name: each(function) for name, function in families.portable(cuattn.attention).items()},
        **{name: each(peers.sdpa) for name in peer_names},
    }


def measure_forward(problem: Problem, sets: int, repeats: int) -> Times | str:
    """The times, or why there are none."""
    inputs = [problem.inputs() for _ in range(sets)]
    outputs = peers.available(*inputs[0], problem.mask, lambda line: print(f"{problem}: {line}", flush=True))
    reason = why_refused(problem, inputs[0], outputs)
    return reason or timing.time_in_turns(providers_of(problem, inputs, list(outputs)), repeats)


def measure_roof(repeats: int) -> Times:
    """An 8192^3 matrix product in bf16."""
    import torch

    a, b = (torch.randn(ROOF_SIZE, ROOF_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return timing.time_in_turns({"matmul": lambda: a @ b}, repeats)


def measure_host(problem: Problem) -> Times:
    inputs = problem.inputs()
    names = list(peers.available(*inputs, problem.mask, lambda line: print(f"host call: {line}", flush=True)))
    return timing.time_host(providers_of(problem, [inputs], names))


def rows_of(
    labels: dict[str, Any], times: Times, flop: float | None = None, roof: float | None = None
) -> list[dict[str, Any]]:
    """CSV rows, a provider each. Of ``flop`` operations a call also the rate, and its share of ``roof`` in FLOP/ms."""
    rows = []
    for name, samples in times.items():
        row = {**labels, "provider": name, **timing.figures(samples), **timing.ratios(name, times)}
        if flop:
            rate = flop / timing.medians(times)[name]
            row["tflops"] = f"{rate / 1e9:.1f}"
            row |= {"percent_of_roof": f"{100 * rate / roof:.1f}"} if roof else {}
        rows.append(row)
    return rows


def line_of(row: dict[str, Any]) -> str:
    """One row for a reader: rate and share of the roof, or the time where no work is counted."""
    spread = f"({row['ms_min']} to {row['ms_max']} ms)"
    if "tflops" not in row:
        return f"{1e3 * float(row['ms']):.1f} us {spread}"
    others = (*peers.SDPA, peers.DETERMINISTIC, "prefill")
    ratios = " ".join(f"{float(row['ratio_to_' + p]):.2f} x {p}" for p in others if f"ratio_to_{p}" in row)
    return f"{row['tflops']:>6} TFLOP/s {row['percent_of_roof']:>5} % of roof {ratios} {spread}"


def print_summary(
    rows: Sequence[dict[str, Any]], figure: str = "forward", providers: Mapping[str, Sequence[str]] = peers.FASTEST
) -> None:
    """TFLOP/s of cuattn and its peers, by dtype: a line for each dtype, head dim and mask, a column for each length."""
    rates: dict[tuple[Any, ...], dict[int, dict[str, str]]] = {}
    for row in rows:
        if row["figure"] == figure and row["pass"] == "first":
            dims = row["head_dim"], row["value_dim"]
            lengths = rates.setdefault((row["dtype"], *dims, row["mask"]), {})
            lengths.setdefault(row["length"], {})[row["provider"]] = f"{float(row['tflops']):.0f}"
    for dtype in dict.fromkeys(key[0] for key in rates):
        print(f"\n{figure}, {dtype}, TFLOP/s by length: " + " / ".join(("cuattn", *providers[dtype])))
    for (dtype, head_dim, value_dim, mask), lengths in rates.items():
        names = ("cuattn", *providers[dtype])
        cells = [f"{n}: " + " / ".join(r.get(name, "-") for name in names) for n, r in lengths.items()]
        print(f"{dtype} d{head_dim:<3} v{value_dim:<3} {mask:6} " + "   ".join(cells))


def head_dims(text: str) -> HeadDims:
    """ "128", or "192:128" for values with a head dim of their own."""
    first, _, second = text.partition(":")
    dims = int(first), int(second or first)
    if not set(dims) <= set(configs.HEAD_DIMS):
        raise argparse.ArgumentTypeError(f"got {text}, expected multiples of 8 up to {configs.HEAD_DIMS[-1]}")
    return dims


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--head-dim", type=head_dims, nargs="+", metavar="D[:DV]", default=[(64, 64), (128, 128)])
    parser.add_argument("--length", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--dtype", nargs="+", choices=configs.DTYPES, default=["bfloat16"])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in a batch (default: %(default)s)")
    parser.add_argument("--sets", type=int, default=2, help="sets of inputs to go through (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=300, help="no new problem after them (default: %(default)s)")
    options, results = begin(parser, COLUMNS)

    def add(problem: Problem | Chunk | str, rows: Sequence[dict[str, Any]]) -> None:
        results.add(rows)
        for row in rows:
            print(f"{problem} {row['pass']:5} {row['provider']:13} {line_of(row)}", flush=True)

    def add_roof(again: str) -> float:
        """Adds a measurement of the roof; returns it, in FLOP/ms."""
        times = measure_roof(options.repeats)
        flop = 2.0 * ROOF_SIZE**3
        measured = flop / timing.medians(times)["matmul"]
        labels = {"figure": "roof", "pass": again, "dtype": "bfloat16", "length": ROOF_SIZE}
        add("roof", rows_of(labels, times, flop, measured))
        return measured

    roof = add_roof("first")
    refused = 0
    todo = problems(options.dtype, options.head_dim, options.length, options.tokens) if "grid" in options.part else []
    todo += other_problems(options.tokens) if "others" in options.part else []
    prefill = None  # FLOP/ms of the first chunk, which is a whole sequence
    work: list[tuple[Problem | Chunk, str]] = [(problem, "first") for problem in todo]
    work += [(chunk, "first") for chunk in Chunk.default_set()] if "chunks" in options.part else []
    work += [(problem, "again") for problem in todo[:1]]
    for problem, again in within(options.seconds, work):
        if isinstance(problem, Chunk):
            result = measure_chunk(problem, options.repeats)
        else:
            result = measure_forward(problem, options.sets, options.repeats)
        if isinstance(result, str):
            refused += 1
            print(f"{problem} REFUSED: {result}", flush=True)
            continue
        figure = "chunk" if isinstance(problem, Chunk) else "forward"
        rows = rows_of({"figure": figure, "pass": again, **asdict(problem)}, result, problem.flop, roof)
        if isinstance(problem, Chunk):
            rate = problem.flop / timing.medians(result)["cuattn"]
            prefill = prefill or rate
            rows[0]["ratio_to_prefill"] = f"{rate / prefill:.3f}"
        add(problem, rows)
    add_roof("again")
    for head_dim, value_dim in options.head_dim if "grid" in options.part else []:
        tiny = Problem(options.dtype[0], "causal", head_dim, value_dim, 16, 1, 2)
        add("host call", rows_of({"figure": "host call", "pass": "first", **asdict(tiny)}, measure_host(tiny)))
    print_summary(results.rows)
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
