"""How long a kernel takes to be ready: compiled into an empty cache, and found in a full one. Needs no GPU.

Every figure is the median over processes started anew, since a process loads its compiler once:
  cold     `cubin_path` with an empty cache folder: NVRTC's load and the compilation; target under 3 s
  warm     `cubin_path` with the kernel in the cache: NVRTC's load, the sources' digest, the check; target under 0.1 s
  process  wall time of that warm process as a whole: Python's start, the imports of cuattn and CuPy, its end
The rate is kernels a second. There is no roof: percent_of_target is the target over the time. The peer is
FlexAttention, which torch compiles at its first call, for the same head dim, mask and dtype; it needs a GPU. Of others
the note says why they have no figures. Exit status 1 if a target is missed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cuattn import config as configs
from cuattn import env
from cuattn.bench import peers, timing
from cuattn.bench.options import add_files, add_providers, chosen_peers, positive
from cuattn.bench.results import PROVENANCE, Results, notes

COLUMNS = (
    *("kernel", "provider", "figure", "median_s", "min_s", "max_s", "repeats", "kernels_per_s", "target_s"),
    *("percent_of_target", *timing.RATIOS, "note", *PROVENANCE),
)
TARGETS = {"cold": 3.0, "warm": 0.1, "process": None}
#: Kernels for many rows, and for few.
ROWS = ("many", "few")
PROGRAM = """
import sys, time
import cupy
from cuattn import config as configs
from cuattn.jit import cubin_path
rows, head_dim, *others = sys.argv[1:]
shape = int(head_dim), int(head_dim), *others
config = configs.few_rows(*shape, False) if rows == "few" else configs.many_rows(*shape, False, False)
start = time.perf_counter()
cubin_path(config)
print(time.perf_counter() - start)
"""


#: The first call of a peer that is compiled then. Its caches are in the folder that the variables below name.
PEER_PROGRAM = """
import sys, time
import torch
from cuattn.bench.peers import PEERS
name, head_dim, mask, dtype = sys.argv[1:]
q, k, v = (torch.randn(1, 1, 512, int(head_dim), device="cuda", dtype=getattr(torch, dtype)) for _ in range(3))
torch.cuda.synchronize()
start = time.perf_counter()
with PEERS[name].setting():
    PEERS[name].attention(q, k, v, mask)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""
PEER_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
#: Why other peers have no figures.
READY = "compiled before it is installed"
REASONS = {**dict.fromkeys(peers.FORWARD, READY), "flashinfer": "compiled by nvcc, or ahead of time"}


def measure(program: str, arguments: Sequence[str], cache: Path) -> tuple[float, float]:
    """Seconds that a program prints, and of its whole process."""
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **dict.fromkeys((env.CACHE_DIR, *PEER_CACHES), str(cache))},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(process.stdout), time.perf_counter() - start


def measure_all(program: str, arguments: Sequence[str], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in TARGETS}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            seconds["cold"].append(measure(program, arguments, Path(folder))[0])
            call, process = measure(program, arguments, Path(folder))
            seconds["warm"].append(call)
            seconds["process"].append(process)
    return seconds


def measure_peer(options: argparse.Namespace) -> dict[str, list[float]] | str:
    """FlexAttention's times, or why there are none."""
    arguments = "flex", str(options.head_dim), options.mask, options.dtype
    try:
        return measure_all(PEER_PROGRAM, arguments, options.repeats)
    except subprocess.CalledProcessError as error:
        return str((error.stderr.strip().splitlines() or [error])[-1])


def rows_of(kernel: str, seconds: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """A row for each provider and figure."""
    rows = []
    for provider, samples_of in seconds.items():
        for figure, samples in samples_of.items():
            median, target = statistics.median(samples), TARGETS[figure]
            row: dict[str, Any] = {
                "kernel": kernel,
                "provider": provider,
                "figure": figure,
                "median_s": f"{median:.4f}",
            }
            row |= {"min_s": f"{min(samples):.4f}", "max_s": f"{max(samples):.4f}", "repeats": len(samples)}
            row["kernels_per_s"] = f"{1 / median:.2f}"
            if target:
                row |= {"target_s": target, "percent_of_target": f"{100 * target / median:.0f}"}
            others = {peer: statistics.median(times[figure]) for peer, times in seconds.items() if peer in peers.PEERS}
            rows.append({**row, **{f"ratio_to_{peer}": f"{other / median:.3f}" for peer, other in others.items()}})
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="default: both")
    parser.add_argument("--head-dim", type=int, choices=configs.HEAD_DIMS, default=128, metavar="D")
    parser.add_argument("--mask", choices=configs.MASKS, default="causal")
    parser.add_argument("--dtype", choices=configs.DTYPES, default="bfloat16")
    parser.add_argument("--arch", choices=configs.ARCHITECTURES, default="sm_90a")
    parser.add_argument("--repeats", type=positive, default=5, help="processes (default: %(default)s)")
    add_providers(parser, peers.FORWARD)
    add_files(parser, plot=False)


def run(options: argparse.Namespace) -> int:
    results = Results(options.csv, COLUMNS)
    shape = options.head_dim, options.head_dim, options.mask, options.dtype, options.arch
    configurations = {"many": configs.many_rows(*shape, False, False), "few": configs.few_rows(*shape, False)}
    reasons = {name: REASONS[name] for name in chosen_peers(options)}
    flex = measure_peer(options) if "flex" in reasons else {}
    if isinstance(flex, str):
        reasons["flex"] = flex
    elif flex:
        del reasons["flex"]
    late = False
    for kind in options.rows:
        kernel = configurations[kind].name
        arguments = kind, str(options.head_dim), options.mask, options.dtype, options.arch
        seconds = {"cuattn": measure_all(PROGRAM, arguments, options.repeats)}
        if isinstance(flex, dict) and flex:
            seconds["flex"] = flex
        rows = [*rows_of(kernel, seconds), *notes({"kernel": kernel}, reasons)]
        results.add(rows)
        for row in rows:
            print(f"{kernel} {row['provider']:10} {line_of(row)}", flush=True)
        own = [row for row in rows if row["provider"] == "cuattn" and "target_s" in row]
        late |= any(float(row["median_s"]) >= row["target_s"] for row in own)
    return int(late)


def line_of(row: dict[str, Any]) -> str:
    if row.get("note"):
        return f"not measured: {row['note']}"
    target = f"   target under {row['target_s']} s" if "target_s" in row else ""
    return f"{row['figure']:8} {float(row['median_s']):7.3f} s{target} {timing.shown_ratios(row)}"
