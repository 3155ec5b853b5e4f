"""``cuattn workload``: the fixed workload as a file, with the hashes of its arrays."""

import argparse
from typing import Any

import numpy as np

from cuattn import backend as backends
from cuattn.api import attention_varlen
from cuattn.cli import libraries
from cuattn.cli.arguments import output_file
from cuattn.config import DTYPES
from cuattn.gradients import attention_varlen_backward
from cuattn.testing import WORKLOAD
from cuattn.testing.workload import run_workload, sha256, stored, type_in_file, workload_inputs


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "workload",
        help="make the fixed workload and print the hashes of its arrays",
        description="Four packed prompts, 59 tokens, in the attention of Qwen3-8B (32 query heads, 8 key heads, head "
        "dim 128, causal): the same bits everywhere. Prints SHA-256, name, dtype and shape of each array.",
    )
    parser.add_argument("--out", metavar="FILE.npz", type=output_file, help="also write the arrays to a file")
    parser.add_argument("--dtype", choices=DTYPES, default=WORKLOAD.dtype, help=f"default: {WORKLOAD.dtype}")
    parser.add_argument(
        "--run",
        action="store_true",
        dest="results",
        help="also results and gradients, from the backend in CUATTN_BACKEND",
    )
    parser.set_defaults(run=run, usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    dtype = arguments.dtype
    arrays = workload_inputs(dtype)
    if arguments.results:
        try:
            library = libraries.choose(backends.active().name)
        except ValueError as error:
            arguments.usage_error(str(error))
        if dtype not in library.dtypes():
            arguments.usage_error(f"--dtype: got {dtype}, which {library.name} cannot hold: pip install ml_dtypes")
        arrays |= run_workload(arrays, dtype, library, attention_varlen, attention_varlen_backward)
    for name, bits in arrays.items():
        print(f"{sha256(bits)}  {name} {type_in_file(name, dtype)} {'x'.join(map(str, bits.shape))}")
    if arguments.out:
        with open(arguments.out, "wb") as file:
            whole: dict[str, Any] = {name: stored(name, bits, dtype) for name, bits in arrays.items()}
            np.savez(file, **whole)
    return 0
