"""The experiment behind docs/numerics.md: what chunk lengths, key tile and row sum do to accuracy. Needs no GPU.

The kernel runs in the emulator in the part of an H200, in variants of the canonical order: other chunk tables and key
tiles (patched into cuattn.contract), and changed kernel files. Errors are those before the output is rounded: in a copy
of the kernels the epilogue stores fp32. Each is against float64 on the same inputs, rounded to the dtype.

Columns, over all elements of 64 query rows that see all keys:
  rel_l2         |out - gold| / |gold|
  bias           mean of (out - gold) sign(gold), over mean |gold|: negative where magnitudes come out too small
  max_lse_error  largest |lse - gold|
"""

import argparse
import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from changes import Substitution, changed_kernels
from numpy.typing import NDArray

from cuattn import config, contract, emulator, schedule
from cuattn.bench.results import ROOT, commit, write_csv
from cuattn.checks import check_attention
from cuattn.interop import Tensor, import_tensor
from cuattn.interop.numpy_ import numpy_dtype
from cuattn.launches import Target
from cuattn.reference.gold import gold_attention
from cuattn.testing.arrays import round_to_bits, values_of

ROWS = 64
ARCH = "sm_90"
#: Standard deviation of the queries, mean of the values.
INPUTS = {
    "normal": (1.0, 0.0),
    "q std 8": (8.0, 0.0),
    "q std 16": (16.0, 0.0),
    "v mean 1": (1.0, 1.0),
    "v mean 30": (1.0, 30.0),
}
COLUMNS = (
    *("variant", "dtype", "head_dim", "keys", "inputs", "rel_l2", "bias", "max_lse_error"),
    *("rows", "arch", "commit", "contract"),
)
#: `out` has rows of 2 head_dim 16-bit words, which hold head_dim fp32 values.
STORE_FP32: tuple[Substitution, ...] = (
    (
        "attn/epilogue.cuh",
        "        const RowPlace to = place_of(row);\n",
        "        const RowPlace to = place_of(row);\n"
        "#pragma unroll\n"
        "        for (int i = 0; exists && i < 2 * units; ++i) {\n"
        "            const float x = normalised(out[i / 2][2 * half + i % 2], scale[half]);\n"
        "            ptx::store_global_f32(reinterpret_cast<float*>(to.out) + i / 2 * 8 + 2 * (lane & 3) + i % 2, x);\n"
        "        }\n",
    ),
    ("attn/epilogue.cuh", "ptx::store_global_u32x4_if(exists && unit < units,", "ptx::store_global_u32x4_if(false,"),
)
SUM_ROUNDED: tuple[Substitution, ...] = (
    (
        "attn/softmax.cuh",
        "= __fadd_rn(rows.sum[row], weight[b][c]);",
        "= __fadd_rn(rows.sum[row], __uint_as_float(ptx::pack_16bit<true>(0.0f, weight[b][c])));",
    ),
)


@dataclass(frozen=True)
class Variant:
    """A canonical order: where chunks start, keys per tile (None: the contract's), and changed kernel lines."""

    table: tuple[tuple[int, int], ...] = contract.CHUNK_TABLE
    key_tile: int | None = None
    substitutions: tuple[Substitution, ...] = ()
    dtypes: tuple[str, ...] = ("bfloat16",)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside it, the emulator compiles this variant."""
        tile = contract.key_tile if self.key_tile is None else lambda head_dim: self.key_tile
        with (
            mock.patch.object(contract, "CHUNK_TABLE", self.table),
            mock.patch.object(contract, "key_tile", tile),
            changed_kernels((*STORE_FP32, *self.substitutions)),
        ):
            config.many_rows.cache_clear()  # variants change what a configuration has worked out
            yield
        config.many_rows.cache_clear()


VARIANTS = {
    "contract": Variant(dtypes=("bfloat16", "float16")),
    **{f"chunks of {keys}": Variant(((0, keys),)) for keys in (256, 512, 1024, 4096)},
    "no chunks": Variant(((0, 1 << 30),), dtypes=("bfloat16", "float16")),
    "key tile 64": Variant(key_tile=64),
    "sum of rounded weights": Variant(substitutions=SUM_ROUNDED),
}


@dataclass(frozen=True)
class Cell:
    variant: str
    dtype: str
    head_dim: int
    keys: int
    inputs: str


def make_inputs(cell: Cell) -> tuple[NDArray[Any], ...]:
    """q (1, 1, ROWS, D), k and v (1, 1, keys, D) in the cell's dtype, the same for every variant."""
    q_std, v_mean = INPUTS[cell.inputs]
    random = np.random.Generator(np.random.Philox(key=cell.head_dim + cell.keys))
    lengths = (ROWS, cell.keys, cell.keys)
    q, k, v = (random.standard_normal((1, 1, length, cell.head_dim), np.float32) for length in lengths)
    arrays = (q * np.float32(q_std), k, v + np.float32(v_mean))
    return tuple(round_to_bits(x, cell.dtype).view(numpy_dtype(cell.dtype)) for x in arrays)


def run_kernel(arrays: Sequence[NDArray[Any]], dtype: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """(out, lse) in fp32 of the active variant on the emulator, for q, k, v."""
    q, k, v = arrays
    problem = check_attention(q, k, v, "full", None, None, "bhsd", None)
    out, lse = np.empty(q.shape, np.float32), np.empty(q.shape[:3], np.float32)
    words, logs = import_tensor(out.view(np.uint16), "out"), import_tensor(lse, "lse")
    target = Target(ARCH, 1)

    def workspace(shape: tuple[int, ...], dtype: str) -> Tensor:
        return import_tensor(np.empty(shape, dtype), "workspace")

    with mock.patch.object(schedule, "FEW_ROWS", 0):  # the kernel that STORE_FP32 changes
        emulator.run(schedule.plan_forward(problem, words, logs, target, workspace))
    return out, lse


def measure(cell: Cell) -> dict[str, Any]:
    arrays = make_inputs(cell)
    with VARIANTS[cell.variant].active():
        out, lse = run_kernel(arrays, cell.dtype)
    q, k, v = (values_of(x.view(np.uint16), cell.dtype).astype(np.float64) for x in arrays)
    gold, gold_lse = gold_attention(q, k, v)
    error = out - gold
    return {
        **vars(cell),
        "rel_l2": f"{np.linalg.norm(error) / np.linalg.norm(gold):.3e}",
        "bias": f"{(error * np.sign(gold)).mean() / np.abs(gold).mean():.2e}",
        "max_lse_error": f"{np.abs(lse - gold_lse).max():.2e}",
        "rows": ROWS,
        "arch": ARCH,
        "contract": contract.CONTRACT_VERSION,
    }


def all_cells(head_dims: Sequence[int], keys: Sequence[int], variants: Sequence[str]) -> list[Cell]:
    return [
        Cell(variant, dtype, head_dim, length, inputs)
        for head_dim, length, variant in itertools.product(head_dims, keys, variants)
        for dtype in VARIANTS[variant].dtypes
        for inputs in INPUTS
    ]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """rel-L2, and bias where values have a mean, a line for each problem and variant."""
    for (dtype, head_dim, keys), group in itertools.groupby(
        sorted(rows, key=lambda r: (r["dtype"], r["head_dim"], r["keys"])),
        lambda r: (r["dtype"], r["head_dim"], r["keys"]),
    ):
        found = {(r["variant"], r["inputs"]): r for r in group}
        print(f"\n{dtype}, head dim {head_dim}, {keys} keys: rel-L2 (and bias) before output rounding")
        print(f"{'':24}" + "".join(f"{name:>22}" for name in INPUTS) + f"{'max LSE error':>16}")
        for variant in dict.fromkeys(name for name, _ in found):
            mine = [found[variant, name] for name in INPUTS]
            errors = "".join(f"{r['rel_l2']:>12} {'(' + r['bias'] + ')':>9}" for r in mine)
            print(f"{variant:24}{errors}{max(float(r['max_lse_error']) for r in mine):16.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--keys", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--csv", type=Path, default=ROOT / "bench" / "results" / "contract_choices.csv")
    options = parser.parse_args()

    start = time.perf_counter()
    cells = all_cells(options.head_dim, options.keys, options.variant)
    source = commit()
    # The copy keeps the figures of one run from one state of the kernels, whatever is edited meanwhile.
    with changed_kernels(()), ProcessPoolExecutor(options.jobs) as pool:
        rows = [{**row, "commit": source} for row in pool.map(measure, cells)]
    write_csv(options.csv, rows, COLUMNS)
    print_table(rows)
    print(f"\n{len(rows)} rows in {time.perf_counter() - start:.0f} s: {options.csv}")


if __name__ == "__main__":
    main()
