"""What the emulator knows of GPUs: the accumulation of their tensor cores and the table of ex2."""

import functools
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class TensorCore:
    """One step of a 16-bit mma sums ``terms`` products and the accumulator, each truncated to ``fraction_bits`` bits.

    A step of TF32 sums half as many.
    After Khattak and Mikaitis (arXiv 2512.07004) and MMA-Sim (arXiv 2511.10909).
    """

    terms: int
    fraction_bits: int


AMPERE = TensorCore(terms=8, fraction_bits=24)
HOPPER = TensorCore(terms=16, fraction_bits=25)


def tensor_core(arch: str) -> TensorCore:
    """sm_8x: Ampere's and Ada's two steps; sm_90 and later: one step, as seen on an H200 and published for a B200."""
    return AMPERE if arch.startswith("sm_8") else HOPPER


@functools.cache
def exp2_table() -> npt.NDArray[np.float32]:
    """``2**(i / 2**23)`` for i in [0, 2**23) as ex2.approx.ftz.f32 gives it: the rounded power and its error in ulp.

    The errors (-1, 0, +1) were captured on an H200. Other architectures are taken to have the same table.
    """
    ulps = np.frombuffer(lzma.decompress((DATA / "h200_ex2_ulp.bin.xz").read_bytes()), np.int8)
    powers = np.exp2(np.arange(ulps.size) / ulps.size).astype(np.float32)
    table: npt.NDArray[np.float32] = (powers.view(np.int32) + ulps).view(np.float32)
    return table
