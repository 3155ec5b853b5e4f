"""Prefill on a GPU beside its peers, after a check of what is timed.

Parts. "grid": as many sequences as make --tokens tokens, 2048 / head_dim heads, as many keys as queries, for each of
--dtype, --head-dim and --length. "others": the same for a few problems with large or two head dims and in fp32. A
problem is timed only if cuattn's output agrees with float64 as well as the peers' does and parts of it computed alone
have the same bits; a peer only if it computes this problem.

Work: 2 B H (D + Dv) operations for each query row and key that it sees; TFLOP/s is work / time, percent_of_roof its
share of an 8192^3 bf16 matrix product measured in the same run. Bytes at least, in 16 bits: 2 (D + Dv) (B H Lq + B Hkv
Lk) for q, k, v and out, 4 B H Lq for the LSE: 0.27 GB at 16K tokens, 0.06 ms on an H200, so products bound the time
from 1K keys on. Timed by CUDA events around calls in a row that go through several sets of inputs, together larger than
the L2 cache; the providers take turns in each repeat. A time is the median of the repeats, beside the smallest and the
largest.

Providers: "cuattn" is the public call, "cuattn launch" the launches alone with everything prepared, "cuattn portable"
the same launches of the portable kernels where others run, with the same bits; the peers are those of --providers, and
of one without figures the note says why. Figures: "forward"; "roof", the matrix product. Pass "again" repeats the first
problem and the roof at the end: the drift. Exit status 1 if a problem was refused.
"""

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import cuattn
from cuattn.bench import answers, families, peers, timing
from cuattn.bench.options import HeadDims, add_effort, add_files, add_grid, add_providers, chosen_peers
from cuattn.bench.peers import Attempt, Call
from cuattn.bench.rates import RATES, Recorder, attention_flop, print_summary, rows_of
from cuattn.bench.results import PROVENANCE, within
from cuattn.bench.runs import begin, finish
from cuattn.bench.timing import Times
from cuattn.launches import Launch

COLUMNS = (
    *("figure", "pass", "dtype", "mask", "head_dim", "value_dim", "length", "batch", "heads"),
    *("provider", *RATES, "note", *PROVENANCE),
)
PARTS = ("grid", "others")
Inputs = tuple[Any, Any, Any]  # q, k and v, (B, H, L, columns)


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

    def inputs(self, device: str = "cuda") -> Inputs:
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


def why_refused(problem: Problem, inputs: Inputs, gold: Any, references: Mapping[str, Any]) -> str | None:
    """None if cuattn's answer is batch-invariant on this problem, and as accurate as others' answers to it."""
    q, k, v = inputs
    out = cuattn.attention(q, k, v, problem.mask)
    for name, function in families.portable(cuattn.attention).items():
        if not answers.same_bits(function(q, k, v, problem.mask), out):
            return f"other bits than {name}"
    reason = answers.why_inaccurate(out, gold, references, problem.dtype)
    return reason or answers.why_not_invariant(cuattn.attention, q, k, v, problem.mask, out)


def planned_launches(q: Any, k: Any, v: Any, mask: str, with_lse: bool = True) -> tuple[list[Launch], tuple[Any, Any]]:
    """Launches with outputs and workspace in place, which keep the memory that they touch alive; output and LSE, which
    may be None.
    """
    import torch

    from cuattn.checks import check_attention
    from cuattn.interop import Tensor, import_tensor
    from cuattn.launch import device_architecture, processor_count
    from cuattn.launches import Target
    from cuattn.schedule import plan_forward

    problem = check_attention(q, k, v, mask, None, None, "bhsd", None)
    query = problem.query
    index = query.device.index

    def allocate(shape: tuple[int, ...], dtype: str) -> Tensor:
        return query.framework.empty(shape, dtype, query.device, query)

    out = torch.empty(problem.out_shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], device=q.device) if with_lse else None
    outputs = import_tensor(out, "out"), None if lse is None else import_tensor(lse, "lse")
    target = Target(device_architecture(index), processor_count(index))
    return plan_forward(problem, *outputs, target, allocate), (out, lse)


def prepared_launches(q: Any, k: Any, v: Any, mask: str) -> Call:
    """The launches alone: checked, planned, with outputs and workspace in place."""
    import torch

    from cuattn.launch import launch_kernel

    launches, outputs = planned_launches(q, k, v, mask)
    stream = torch.cuda.current_stream().cuda_stream

    def launch() -> Any:
        for one in launches:
            launch_kernel(one, q.device.index, stream)
        return outputs

    return launch


def providers_of(problem: Problem, sets: Sequence[Inputs]) -> dict[str, Call]:
    """cuattn's: functions of which every call takes the next of the sets of inputs."""

    def each(function: Callable[..., Any]) -> Call:
        return timing.rotating([partial(function, *qkv, problem.mask) for qkv in sets])

    return {
        "cuattn": each(cuattn.attention),
        "cuattn launch": timing.rotating([prepared_launches(*qkv, problem.mask) for qkv in sets]),
        **{
            name: timing.rotating([prepare(*qkv, problem.mask) for qkv in sets])
            for name, prepare in families.portable(prepared_launches).items()
        },
    }


def attempt(problem: Problem, sets: Sequence[Inputs], names: Sequence[str]) -> tuple[Attempt, str | None]:
    """What the peers made of the problem, and why cuattn's answer is refused, or None."""
    tried = peers.attempt(names, lambda peer: [peer.prepare(*qkv, problem.mask) for qkv in sets])
    gold, _, unfused = answers.gold_and_unfused(*sets[0], problem.mask)
    references = answers.references(tried, lambda result: result, gold, unfused)
    return tried, why_refused(problem, sets[0], gold, references)


def measure(problem: Problem, names: Sequence[str], sets: int, repeats: int) -> tuple[Times, dict[str, str]] | str:
    """(times, why peers have none), or why there are none at all."""
    inputs = [problem.inputs() for _ in range(sets)]
    tried, refused = attempt(problem, inputs, names)
    if refused:
        return refused
    others = {name: timing.rotating(calls) for name, calls in tried.calls.items()}
    return timing.time_in_turns({**providers_of(problem, inputs), **others}, repeats), tried.reasons


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="default: both")
    add_grid(parser, [(64, 64), (128, 128)])
    add_providers(parser, peers.FORWARD)
    add_effort(parser, repeats=9)
    add_files(parser)


def run(options: argparse.Namespace) -> int:
    results = begin(options, COLUMNS)
    recorder = Recorder(results, options.repeats)
    names = chosen_peers(options)
    roof = recorder.add_roof("first")
    todo = problems(options.dtype, options.head_dim, options.length, options.tokens) if "grid" in options.part else []
    todo += other_problems(options.tokens) if "others" in options.part else []
    todo = list(dict.fromkeys(todo))  # both parts may have the same ones
    for problem, again in within(options.seconds, [*((p, "first") for p in todo), (todo[0], "again")]):
        measured = recorder.accepted(problem, measure(problem, names, options.sets, options.repeats))
        if measured is None:
            continue
        times, reasons = measured
        labels = {"figure": "forward", "pass": again, **asdict(problem)}
        recorder.add(problem, rows_of(labels, times, problem.flop, roof, reasons))
    recorder.add_roof("again")
    print_summary(results.rows, "forward", names)
    finish(options, results)
    return int(recorder.refused > 0)
