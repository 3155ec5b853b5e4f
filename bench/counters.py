"""What limits the kernels on a GPU: Nsight Compute's counters for a few calls, of cuattn and of cuDNN.

    python3 bench/counters.py --csv FILE

runs itself under ncu, which must be on the path. Each kernel of a call is a row: its time, its clock, how busy the
tensor cores, the issue of instructions, shared memory and the units of exponentials were, in percent of what they can
do; bytes a second that came from memory and from the L2 cache; instructions; and what a warp waited for, in cycles for
each instruction issued. Caches are emptied before each kernel, and kernels run one by one: times are not those of calls
in a row.
"""

import argparse
import csv
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cuattn
from cuattn.bench import chunked, decode, peers, prefill
from cuattn.bench.results import PROVENANCE, Results

#: Column -> counter of Nsight Compute.
COUNTERS = {
    "us": "gpu__time_duration.sum",
    "ghz": "sm__cycles_elapsed.avg.per_second",
    "tensor_percent": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "shared_percent": "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "exp_percent": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "memory_gb_per_s": "dram__bytes.sum.per_second",
    "l2_gb_per_s": "l1tex__m_xbar2l1tex_read_bytes.sum.per_second",
    "instructions": "smsp__inst_executed.sum",
    **{
        f"stalled_{reason}": f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
        for reason in ("wait", "short_scoreboard", "long_scoreboard", "barrier", "dispatch_stall", "not_selected")
    },
}
#: From ncu's base units to those of the columns.
SCALES = {"us": 1e-3, "ghz": 1e-9, "memory_gb_per_s": 1e-9, "l2_gb_per_s": 1e-9}
COLUMNS = ("problem", "provider", "kernel", *COUNTERS, *PROVENANCE)
PEER = "cudnn"
TOKENS = 16384


def problems() -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    """(name, a call of each provider)."""
    peer = peers.PEERS[PEER]
    for head_dim, mask, length in (
        *((128, "full", n) for n in (512, 2048, 8192)),
        (64, "causal", 512),
        (192, "full", 8192),
        (256, "full", 2048),
    ):
        qkv = prefill.Problem("bfloat16", mask, head_dim, head_dim, length, TOKENS // length, 2048 // head_dim).inputs()
        calls = {"cuattn": partial(cuattn.attention, *qkv, mask), PEER: peer.prepare(*qkv, mask)}
        yield f"D {head_dim} {mask} {length}", calls
    for length in (64, 256):
        inputs = chunked.Chunk(length, 8192 + length).inputs()
        yield f"{length} tokens over 8192", {"cuattn": partial(cuattn.attention_kvcache, *inputs)}
    given = decode.Problem(8, 8192, 32, 8).inputs()
    yield "decode 8 x 8192", {"cuattn": partial(cuattn.attention_kvcache, **given), PEER: peer.decode(**given)}


def make_calls() -> None:
    """Calls once each, where ncu listens, in ranges named after problem and provider."""
    import torch

    runtime = torch.cuda.cudart()
    for name, calls in problems():
        for provider, call in calls.items():
            with peers.setting_of(provider):
                call()  # compiles, loads
                torch.cuda.synchronize()
                runtime.cudaProfilerStart()
                torch.cuda.nvtx.range_push(f"{name}|{provider}|")
                call()
                torch.cuda.synchronize()
                torch.cuda.nvtx.range_pop()
                runtime.cudaProfilerStop()


def rows_of(report: str) -> Iterator[dict[str, Any]]:
    """Rows of ncu's CSV, whose second line has the units."""
    lines = [line for line in report.splitlines() if line.startswith('"')]
    for row in list(csv.DictReader(io.StringIO("\n".join(lines))))[1:]:
        problem, provider, kernel = row["Kernel Name"].split("|", 2)
        figures = {column: float(row[counter].replace(",", "")) for column, counter in COUNTERS.items()}
        figures = {column: f"{figure * SCALES.get(column, 1):.6g}" for column, figure in figures.items()}
        # cuDNN's names are long, and begin with what they have in common
        yield {"problem": problem, "provider": provider, "kernel": kernel.strip("/")[-80:], **figures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="the file to write")
    parser.add_argument("--calls", action="store_true", help="make the calls alone: what ncu runs")
    options = parser.parse_args()
    if options.calls:
        make_calls()
        return 0
    ncu = ["ncu", "--profile-from-start", "off", "--nvtx", "--print-nvtx-rename", "kernel", "--clock-control", "none"]
    ncu += ["--page", "raw", "--csv", "--print-units", "base", "--metrics", ",".join(COUNTERS.values())]
    done = subprocess.run([*ncu, sys.executable, __file__, "--calls"], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
        return done.returncode
    results = Results(options.csv, COLUMNS)
    results.add(rows_of(done.stdout))
    for row in results.rows:
        print(f"{row['problem']:22} {row['provider']:7} {row['us']:>8} us, tensor cores {row['tensor_percent']} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
