"""How long a kernel takes to be ready: compiled into an empty cache, and found in a full one. Needs no GPU.

Every figure is the median over processes started anew, since a process loads NVRTC once:
  cold     `cubin_path` with an empty cache folder: NVRTC's load and the compilation; target under 3 s
  warm     `cubin_path` with the kernel in the cache: NVRTC's load, the sources' digest, the check; target under 0.1 s
  process  wall time of that warm process as a whole: Python's start, the imports of cuattn and CuPy, its end
Exit status 1 if a target is missed.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cuattn import config as configs
from cuattn import env
from cuattn.jit import compiler

TARGETS = {"cold": 3.0, "warm": 0.1, "process": None}
PROGRAM = """
import sys, time
import cupy
from cuattn.config import select_config
from cuattn.jit import cubin_path
config = select_config(int(sys.argv[1]), *sys.argv[2:])
start = time.perf_counter()
cubin_path(config)
print(time.perf_counter() - start)
"""


def measure(config: configs.KernelConfig, cache: Path) -> tuple[float, float]:
    """Seconds of `cubin_path`, and of the whole process that calls it."""
    arguments = [str(config.head_dim), config.mask, config.dtype, config.arch]
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, env.CACHE_DIR: str(cache)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(process.stdout), time.perf_counter() - start


def measure_all(config: configs.KernelConfig, repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in TARGETS}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            seconds["cold"].append(measure(config, Path(folder))[0])
            call, process = measure(config, Path(folder))
            seconds["warm"].append(call)
            seconds["process"].append(process)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, choices=configs.HEAD_DIMS, default=128)
    parser.add_argument("--mask", choices=configs.MASKS, default="causal")
    parser.add_argument("--dtype", choices=configs.DTYPES, default="bfloat16")
    parser.add_argument("--arch", choices=configs.ARCHITECTURES, default="sm_90a")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    options = parser.parse_args()

    config = configs.select_config(options.head_dim, options.mask, options.dtype, options.arch)
    seconds = measure_all(config, options.repeats)
    rows = [
        {
            "kernel": config.name,
            "figure": name,
            "median_s": f"{statistics.median(samples):.4f}",
            "min_s": f"{min(samples):.4f}",
            "max_s": f"{max(samples):.4f}",
            "target_s": TARGETS[name] or "",
            "repeats": options.repeats,
            "nvrtc": "{}.{}".format(*compiler.nvrtc_version()),
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        for name, samples in seconds.items()
    ]
    print(f"{config.name}, NVRTC {rows[0]['nvrtc']}, {rows[0]['machine']}, median of {options.repeats}")
    for row in rows:
        target = f"   target under {row['target_s']} s" if row["target_s"] else ""
        print(f"{row['figure']:8} {float(row['median_s']):7.3f} s{target}")
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return int(any(target and statistics.median(seconds[name]) >= target for name, target in TARGETS.items()))


if __name__ == "__main__":
    sys.exit(main())
