"""Small problems for compute-sanitizer: every kernel, ragged lengths, strides, grouped heads, NaN in the values.

    compute-sanitizer --tool memcheck --padding 4096 --error-exitcode 99 python3 bench/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 99 python3 bench/sanitize.py --plant barrier

Each array is an allocation of its own, since a pool would hide what lies behind its end; --padding keeps the next one
away. --plant puts a bug into a copy of the kernels, which the tool has to find: where it does not, its silence about
the kernels means nothing.
"""

import argparse
import contextlib
import itertools
from dataclasses import replace

import numpy as np
from common import Substitution, changed_kernels

import cuattn
from cuattn import config as configs
from cuattn.testing import Case, CupyLibrary, make_inputs
from cuattn.testing.subject import contiguous, padded, rows_first

PLANTS: dict[str, Substitution] = {
    # for memcheck: rows behind the end of the output are written, rows behind the end of q, k and v are read
    "write": (
        "attn/epilogue.cuh",
        "        if (row < valid) {\n            ptx::store_global_u32x4",
        "        if (true) {\n            ptx::store_global_u32x4",
    ),
    "read": ("ptx/cp_async.cuh", '"r"(valid ? 16 : 0)', '"r"(16)'),
    # for racecheck: two warps use the same memory, tiles are read before all of their copies have landed
    "overlap": (
        "forward_sm80.cuh",
        "ptx::shared_address(shared.rows[warp])",
        "ptx::shared_address(shared.rows[warp / 2])",
    ),
    "barrier": ("forward_sm80.cuh", "__syncthreads();  // this step's tile", "// this step's tile"),
}
#: (heads, kv_heads, len_q, len_k); the third crosses the end of the first chunk.
SHAPES = ((1, 1, 1, 1), (4, 2, 113, 203), (1, 1, 33, 530), (1, 1, 70, 3))
PLACES = (contiguous, padded, rows_first)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plant", choices=PLANTS, help="a bug to put into the kernels")
    parser.add_argument("--head-dim", type=int, nargs="+", choices=configs.HEAD_DIMS, default=[24, 64, 72, 128])
    options = parser.parse_args()

    import cupy

    cupy.cuda.set_allocator(None)
    kernels = changed_kernels([PLANTS[options.plant]]) if options.plant else contextlib.nullcontext()
    count = 0
    with kernels:
        for head_dim, mask, dtype, shape in itertools.product(options.head_dim, configs.MASKS, configs.DTYPES, SHAPES):
            heads, kv_heads, len_q, len_k = shape
            run(Case(len_q, len_k, mask, dtype, head_dim, 2, heads, kv_heads))
            count += 1
    print(f"{count} problems, planted bug: {options.plant or 'none'}")


if __name__ == "__main__":
    main()
