"""``cuattn bench``: speed on this machine beside other implementations, and pictures of it."""

import argparse
from typing import Any

from cuattn.bench import backward, chunked, decode, host, jit, plots, prefill

BENCHMARKS = {
    "prefill": (prefill, "attention over whole sequences, TFLOP/s"),
    "chunked": (chunked, "new tokens of a sequence over its cache, TFLOP/s"),
    "decode": (decode, "one new token a sequence over its cache, GB/s"),
    "backward": (backward, "gradients, alone and with the forward pass; the memory that they take"),
    "host": (host, "what a call costs its thread; --stub needs no GPU"),
    "jit": (jit, "how long a kernel takes to compile, and to be found compiled; needs no GPU"),
    "plot": (plots, "draw rates against lengths, and the price of invariance, from CSV files; needs no GPU"),
}


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("bench", help="measure speed beside other implementations; draw it")
    benchmarks = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    for name, (module, summary) in BENCHMARKS.items():
        benchmark = benchmarks.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_options(benchmark)
        benchmark.set_defaults(run=module.run, usage_error=benchmark.error)
