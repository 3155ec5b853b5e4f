"""Gradients on a GPU beside its peers', after a check of what is timed; or with --memory what it holds.

As many sequences as make --tokens tokens, 2048 / head_dim heads, as many keys as queries, for each of --dtype,
--head-dim and --length. A problem is timed only if the gradients of the last sequence's first head agree with torch's
autograd in float64 as well as the peers' do, and if all gradients have the same bits again, through autograd, and where
the last sequence or the first head is computed alone; a peer only if it computes these gradients.

Figures: "backward", the gradients alone: `cuattn.attention_backward`, and of the peers torch.autograd.grad on a
retained graph; "forward+backward", both through autograd: `cuattn.attention` of tensors that require gradients. Work:
2.5 and 3.5 times the forward pass's of `cuattn bench prefill`, the convention of other published figures (2.5: five
products of matrices where the forward pass has two). TFLOP/s is work / time, percent_of_roof its share of an 8192^3
bf16 matrix product measured in the same run. Timed like prefill, by CUDA events around calls in a row that go through
several sets of inputs. Pass "again" repeats the first problem and the roof at the end: the drift.

Providers: "cuattn", and the peers of --providers; of one without figures the note says why. "flash_deterministic" is
torch SDPA's flash backend under torch.use_deterministic_algorithms, which promises the same bits in each run.

--memory: a forward and backward pass of one sequence, 4 heads, D 128, of 16K and of 64K tokens: the peak of
torch.cuda.max_memory_allocated above what was allocated before, inputs and results included, in bytes for each token.
cuattn's is refused if that of 64K is more than 4 x 1.1 times that of 16K. Exit status 1 if anything was refused.
"""

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import cuattn
from cuattn import config as configs
from cuattn.bench import answers, peers, timing
from cuattn.bench.options import add_effort, add_files, add_grid, add_providers, chosen_peers
from cuattn.bench.peers import Attempt, Call, Peer
from cuattn.bench.prefill import Problem, problems
from cuattn.bench.rates import RATES, Recorder, print_summary, rows_of
from cuattn.bench.results import PROVENANCE, notes, within
from cuattn.bench.runs import begin, finish
from cuattn.bench.timing import Times
from cuattn.testing import LIMITS
from cuattn.testing.gradient_accuracy import GradientError

COLUMNS = (
    *("figure", "pass", "dtype", "mask", "head_dim", "value_dim", "length", "batch", "heads", "provider"),
    *(*RATES, "peak_bytes", "bytes_per_token", "note", *PROVENANCE),
)
#: Work in units of the forward pass's.
WORK = {"backward": 2.5, "forward+backward": 3.5}
MEMORY_LENGTHS = 16384, 65536
#: What more than in proportion to the length may be held.
MEMORY_MARGIN = 1.1
#: What is compared with float64: the last sequence's first head.
CHECKED = slice(-1, None), slice(0, 1)
NAMES = ("dq", "dk", "dv")
Three = tuple[Any, ...]


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
        q, k, v, dout = (x[index] for x in (self.q, self.k, self.v, self.dout))
        return Given(q, k, v, dout, self.mask)

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

    def gold(self) -> tuple[Three, Three]:
        """The gradients of what is checked in float64, and of the unfused peer."""
        part = self[CHECKED]
        return answers.gold_and_unfused_gradients(part.dout, part.q, part.k, part.v, self.mask)

    def both(self, attention: Callable[..., Any]) -> Three:
        """A forward and a backward pass."""
        return self.retained(attention)()


def why_refused(given: Given, others: Mapping[str, Three]) -> str | None:
    """None if cuattn's gradients are accurate, invariant and autograd's; ``others``: the peers', of what is CHECKED."""
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
        for name, actual, whole in zip(NAMES, alone, gradients, strict=True):
            if not answers.same_bits(actual, whole[part]):
                return f"{name}: other bits for {where}"
    gold, unfused = given.gold()
    for i, name in enumerate(NAMES):
        references = [unfused[i], *(result[i] for result in others.values())]
        reason = why_inaccurate(gradients[i][CHECKED], gold[i], references)
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


def attempt(figure: str, sets: Sequence[Given], names: Sequence[str]) -> Attempt:
    """What the peers made of a figure."""

    def calls_of(peer: Peer) -> list[Call]:
        if figure == "backward":
            return [given.retained(peer.attention) for given in sets]
        return [partial(given.both, peer.attention) for given in sets]

    tried = peers.attempt(names, calls_of)
    gold, unfused = sets[0].gold()
    for i, name in enumerate(NAMES):
        wrong = answers.why_wrong({p: result[i][CHECKED] for p, result in tried.results.items()}, gold[i], unfused[i])
        tried.refuse({peer: f"{name}: {reason}" for peer, reason in wrong.items()})
    return tried


def own_call(figure: str, sets: Sequence[Given]) -> Call:
    """cuattn's, of which every call takes the next of the sets of inputs."""
    if figure == "backward":
        return timing.rotating([given.backward() for given in sets])
    return timing.rotating([partial(given.both, cuattn.attention) for given in sets])


def measure(
    problem: Problem, names: Sequence[str], sets: int, repeats: int, device: str = "cuda"
) -> dict[str, tuple[Times, dict[str, str]]] | str:
    """By figure (times, why peers have none), or why there are none at all."""
    inputs = [Given.make(problem, device) for _ in range(sets)]
    measured: dict[str, tuple[Times, dict[str, str]]] = {}
    for figure in WORK:
        tried = attempt(figure, inputs, names)
        if not measured:
            parts = {name: tuple(x[CHECKED] for x in result) for name, result in tried.results.items()}
            refused = why_refused(inputs[0], parts)
            if refused:
                return refused
        tried.results.clear()
        calls = {name: timing.rotating(calls) for name, calls in tried.calls.items()}
        times = timing.time_in_turns({"cuattn": own_call(figure, inputs), **calls}, repeats)
        measured[figure] = times, tried.reasons
    return measured


def peak_of(attention: Callable[..., Any], problem: Problem) -> int:
    """The most bytes that tensors hold at a time in a forward and backward pass, with those that it starts from."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    Given.make(problem).both(attention)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _calls_of_peak(peak: Callable[..., int], problem: Problem, peer: Peer) -> list[Call]:
    return [partial(peak, peer.attention, problem)]


def measure_memory(
    dtype: str, mask: str, names: Sequence[str], head_dim: int = 128, heads: int = 4, peak: Callable[..., int] = peak_of
) -> tuple[list[dict[str, Any]], str | None]:
    """CSV rows, and why cuattn's memory is not in proportion to the length, or None."""
    rows = []
    own = []
    for length in MEMORY_LENGTHS:
        problem = Problem(dtype, mask, head_dim, head_dim, length, 1, heads)
        own.append(peak(cuattn.attention, problem))
        tried = peers.attempt(names, partial(_calls_of_peak, peak, problem))
        labels = {"figure": "memory", "pass": "first", **asdict(problem)}
        for name, size in {"cuattn": own[-1], **tried.results}.items():
            figures = {"peak_bytes": size, "bytes_per_token": f"{size / length:.1f}"}
            figures |= {f"ratio_to_{peer}": f"{other / size:.3f}" for peer, other in tried.results.items()}
            rows.append({**labels, "provider": name, **figures})
        rows += notes(labels, tried.reasons)
    short, long = own
    allowed = MEMORY_MARGIN * short * MEMORY_LENGTHS[1] / MEMORY_LENGTHS[0]
    return rows, None if long <= allowed else f"{long} bytes at {MEMORY_LENGTHS[1]} tokens, allowed {allowed:.0f}"


def run_memory(options: argparse.Namespace, recorder: Recorder) -> None:
    names = chosen_peers(options)
    for dtype, mask in itertools.product(options.dtype, configs.MASKS):
        # what kernels and libraries allocate once is not a problem's
        measure_memory(dtype, mask, names)
        rows, reason = measure_memory(dtype, mask, names)
        recorder.add(f"{dtype} d128 {mask:6}", rows)
        if reason:
            recorder.refuse(f"{dtype} {mask}", reason)


def run_rates(options: argparse.Namespace, recorder: Recorder) -> None:
    names = chosen_peers(options)
    roof = recorder.add_roof("first")
    todo = problems(options.dtype, options.head_dim, options.length, options.tokens)
    for problem, again in within(options.seconds, [*((p, "first") for p in todo), (todo[0], "again")]):
        measured = recorder.accepted(problem, measure(problem, names, options.sets, options.repeats))
        if measured is None:
            continue
        for figure, (times, reasons) in measured.items():
            labels = {"figure": figure, "pass": again, **asdict(problem)}
            recorder.add(problem, rows_of(labels, times, WORK[figure] * problem.flop, roof, reasons))
    recorder.add_roof("again")
    for figure in WORK:
        print_summary(recorder.results.rows, figure, names)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", action="store_true", help="the memory that is held in place of the time")
    add_grid(parser, [(64, 64), (128, 128), (256, 256)])
    add_providers(parser, tuple(peers.PEERS))
    add_effort(parser, repeats=5)
    add_files(parser)


def run(options: argparse.Namespace) -> int:
    recorder = Recorder(begin(options, COLUMNS), options.repeats)
    (run_memory if options.memory else run_rates)(options, recorder)
    finish(options, recorder.results)
    return int(recorder.refused > 0)
