"""Small problems for compute-sanitizer: every kernel and public function, ragged lengths, strides, NaN in the values.

    compute-sanitizer --tool memcheck --padding 4096 --error-exitcode 99 python3 bench/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 99 python3 bench/sanitize.py --plant barrier --call

The kernel for many rows is tried on a grid of problems, for each --head-dim; the others by the calls of bench/calls.py.

Each array is an allocation of its own, since a pool would hide what lies behind its end; --padding keeps the next one
away. A call that would launch the kernel of --leave-out is left out, which is said. --plant puts a bug into a copy of
the kernels, which the tool has to find: where it does not, its silence about the kernels means nothing.
"""

import argparse
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
from calls import CALLS, Call, append
from changes import Substitution, changed_kernels

import cuattn
from cuattn import config as configs
from cuattn import dispatch
from cuattn.launches import Launch
from cuattn.testing import Case, CupyLibrary, make_inputs
from cuattn.testing.subject import contiguous, padded, rows_first

PLANTS: dict[str, Substitution] = {
    # for memcheck: rows behind the end of the output are written, rows behind the end of q, k and v are read, new keys
    # are written behind the end of a cache, gradients behind that of queries
    "write": (
        "attn/epilogue.cuh",
        "ptx::store_global_u32x4_if(exists && unit < units,",
        "ptx::store_global_u32x4_if(unit < units,",
    ),
    "read": ("ptx/cp_async.cuh", '"r"(valid ? 16 : 0)', '"r"(16)'),
    "append": ("append_kv.cuh", "length < params.key_length - (source - first);", "true;"),
    "gradient": ("backward_queries.cuh", "        if (number >= end.query_length) continue;\n", ""),
    # for racecheck: two warps use the same memory, tiles are read before all of their copies have landed, counts and
    # other warps' scores before they are there
    "overlap": (
        "forward_sm80.cuh",
        "ptx::shared_address(shared.rows[warp])",
        "ptx::shared_address(shared.rows[warp / 2])",
    ),
    "barrier": ("forward_sm80.cuh", "__syncthreads();  // this step's tile", "// this step's tile"),
    "columns": (
        "forward_columns.cuh",
        "ptx::cp_async_wait<lookahead - 1>();\n        __syncthreads();",
        "ptx::cp_async_wait<lookahead - 1>();\n        // a barrier",
    ),
    "scan": ("attn/compaction.cuh", "            __syncthreads();", "            // a barrier"),
    "rows": (
        "backward_keys.cuh",
        "            __syncthreads();  // this step's rows",
        "            // this step's rows",
    ),
    "shared": ("backward_keys.cuh", "turn_ ^= 1;\n            __syncthreads();", "turn_ ^= 1;"),
    "keys": ("backward_queries.cuh", "        __syncthreads();  // this step's keys", "        // this step's keys"),
}
#: Those that the kernel for many rows serves.
DTYPES = ("float16", "bfloat16")
#: (heads, kv_heads, len_q, len_k), all of them many rows; the third crosses the end of the first chunk.
SHAPES = ((1, 1, 65, 1), (4, 2, 113, 203), (1, 1, 133, 530), (1, 1, 70, 3))
PLACES = (contiguous, padded, rows_first)
#: Also a call that the emulator refuses: the last new keys have no place in the cache, and are not written.
ALL_CALLS: dict[str, Call] = {**CALLS, "append beyond": partial(append, lengths=(0, 77, 298))}


def run(case: Case) -> None:
    """Calls on the device, waited for: each placement of the arrays, then with NaN in the last key's values."""
    import cupy

    library = CupyLibrary()
    inputs = make_inputs(case)
    last = inputs.v.copy()
    # NaN: under a causal mask all but the last rows have to be computed alone
    last[:, :, -1] = np.iinfo(last.dtype).max
    calls = [(inputs, place) for place in PLACES] + [(replace(inputs, v=last), contiguous)]
    for given, place in calls:
        q, k, v = (place(library, bits, case.dtype) for bits in (given.q, given.k, given.v))
        cuattn.attention(q, k, v, case.mask)
        cupy.cuda.Device().synchronize()


class LeftOutError(Exception):
    """The call would launch the kernel that is left out."""


@contextlib.contextmanager
def without(kernel: str | None) -> Iterator[None]:
    """Inside it a call raises LeftOutError instead of launching the kernel."""
    launch_kernel = dispatch.launch_kernel

    def launch(one: Launch, device_index: int, stream: int) -> None:
        if one.config.kernel == kernel:
            raise LeftOutError
        launch_kernel(one, device_index, stream)

    with mock.patch.object(dispatch, "launch_kernel", launch):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plant", choices=PLANTS, help="a bug to put into the kernels")
    parser.add_argument("--head-dim", type=int, nargs="*", metavar="D", default=[24, 64, 72, 128], help="of the grid")
    parser.add_argument("--call", nargs="*", metavar="CALL", default=list(ALL_CALLS), help="; ".join(ALL_CALLS))
    parser.add_argument("--leave-out", metavar="KERNEL", help="such as decode_sm90")
    options = parser.parse_args()

    import cupy

    cupy.cuda.set_allocator(None)
    kernels = changed_kernels([PLANTS[options.plant]]) if options.plant else contextlib.nullcontext()
    count = 0
    with kernels, without(options.leave_out):
        for head_dim, mask, dtype, shape in itertools.product(options.head_dim, configs.MASKS, DTYPES, SHAPES):
            heads, kv_heads, len_q, len_k = shape
            run(Case(len_q, len_k, mask, dtype, head_dim, 2, heads, kv_heads))
            count += 1
        for name in options.call:
            try:
                ALL_CALLS[name](CupyLibrary())
                count += 1
            except LeftOutError:
                print(f"left out: {name}")
            cupy.cuda.Device().synchronize()
    print(f"{count} problems, planted bug: {options.plant or 'none'}")


if __name__ == "__main__":
    main()
