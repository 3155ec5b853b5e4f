"""How long a kernel takes to be ready: compiled into an empty cache, and found in a full one. Needs no GPU.

Every figure is the median over processes started anew, since a process loads NVRTC once:
  cold     `cubin_path` with an empty cache folder: NVRTC's load and the compilation; target under 3 s
  warm     `cubin_path` with the kernel in the cache: NVRTC's load, the sources' digest, the check; target under 0.1 s
  process  wall time of that warm process as a whole: Python's start, the imports of cuattn and CuPy, its end
Exit status 1 if a target is missed.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import write_csv

from cuattn import config as configs
from cuattn import env
from cuattn.jit import compiler

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


def measure(arguments: Sequence[str], cache: Path) -> tuple[float, float]:
    """Seconds of `cubin_path`, and of the whole process that calls it, for PROGRAM's arguments."""
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, env.CACHE_DIR: str(cache)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(process.stdout), time.perf_counter() - start


def measure_all(arguments: Sequence[str], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in TARGETS}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            seconds["cold"].append(measure(arguments, Path(folder))[0])
            call, process = measure(arguments, Path(folder))
            seconds["warm"].append(call)
            seconds["process"].append(process)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="default: both")
    parser.add_argument("--head-dim", type=int, choices=configs.HEAD_DIMS, default=128)
    parser.add_argument("--mask", choices=configs.MASKS, default="causal")
    parser.add_argument("--dtype", choices=configs.DTYPES, default="bfloat16")
    parser.add_argument("--arch", choices=configs.ARCHITECTURES, default="sm_90")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    options = parser.parse_args()

    shape = options.head_dim, options.head_dim, options.mask, options.dtype, options.arch
    configurations = {"many": configs.many_rows(*shape, False, False), "few": configs.few_rows(*shape, False)}
    table = []
    late = False
    for kind in options.rows:
        name = configurations[kind].name
        arguments = kind, str(options.head_dim), options.mask, options.dtype, options.arch
        seconds = measure_all(arguments, options.repeats)
        print(f"{name}, median of {options.repeats}")
        for figure, samples in seconds.items():
            median, target = statistics.median(samples), TARGETS[figure]
            late |= target is not None and median >= target
            print(f"{figure:8} {median:7.3f} s" + (f"   target under {target} s" if target else ""), flush=True)
            table.append(
                {
                    "kernel": name,
                    "figure": figure,
                    "median_s": f"{median:.4f}",
                    "min_s": f"{min(samples):.4f}",
                    "max_s": f"{max(samples):.4f}",
                    "target_s": target or "",
                    "repeats": options.repeats,
                    "nvrtc": "{}.{}".format(*compiler.nvrtc_version()),
                    "python": platform.python_version(),
                    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                }
            )
    if options.csv:
        write_csv(options.csv, table, list(table[0]))
    return int(late)


if __name__ == "__main__":
    sys.exit(main())
