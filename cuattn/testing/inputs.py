"""Cases and their inputs, the same on every machine: a counter-based generator, a seed, one rounding."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.testing.arrays import Bits, round_to_bits

#: How the inputs of a family differ from independent normal numbers of mean 0 and standard deviation 1.
FAMILIES = {
    "normal": "mean 0, standard deviation 1",
    "peaked 8": "queries of standard deviation 8: a softmax of few large weights",
    "peaked 16": "queries of standard deviation 16",
    "large mean": "values of mean 30: errors of the weights do not cancel",
    "long context": "as normal, over many keys: rounding adds up",
}
_QUERY_STD = {"peaked 8": 8.0, "peaked 16": 16.0}
_VALUE_MEAN = {"large mean": 30.0}


@dataclass(frozen=True)
class Case:
    """A problem: q (batch, heads, len_q, head_dim), k (batch, kv_heads, len_k, head_dim), v, and how to fill it.

    dtype is "float16", "bfloat16" or "float32", family a key of FAMILIES, scale None for ``head_dim**-0.5``. v has
    value_dim columns, or head_dim for None. lengths: of each sequence, in the checks of sequences of different lengths;
    None leaves them to the check.
    """

    len_q: int
    len_k: int
    mask: str = "causal"
    dtype: str = "float16"
    head_dim: int = 64
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    family: str = "normal"
    scale: float | None = None
    seed: int = 0
    value_dim: int | None = None
    lengths: tuple[int, ...] | None = None

    @property
    def dims(self) -> str:
        """ "d64", or "d192/128" where v has head dims of its own."""
        return f"d{self.head_dim}" + f"/{self.value_dim}" * (self.value_dim is not None)

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.heads}/{self.kv_heads}x{self.len_q}x{self.len_k}"
        return f"{self.dtype} {self.dims} {self.mask} {shape}" + f" {self.family}" * (self.family != "normal")


@dataclass(frozen=True)
class Inputs:
    """Raw bits of q (B, Hq, Lq, D), k (B, Hkv, Lk, D) and v (B, Hkv, Lk, Dv)."""

    q: Bits
    k: Bits
    v: Bits

    def items(self, index: slice | list[int]) -> "Inputs":
        """The sequences of the batch that ``index`` picks."""
        return Inputs(self.q[index], self.k[index], self.v[index])

    def with_keys(self, count: int) -> "Inputs":
        """The first ``count`` keys."""
        return self.keys(slice(count))

    def keys(self, index: slice | NDArray[Any]) -> "Inputs":
        """The keys that ``index`` picks."""
        return replace(self, k=self.k[:, :, index], v=self.v[:, :, index])

    def with_rows(self, first: int, last: int) -> "Inputs":
        """The query rows from ``first`` up to but not including ``last``."""
        return replace(self, q=self.q[:, :, first:last])


def make_inputs(case: Case) -> Inputs:
    """The inputs of a case. Raises ValueError for an unknown family."""
    if case.family not in FAMILIES:
        raise ValueError(f"family: got {case.family!r}, expected one of {', '.join(map(repr, FAMILIES))}")
    random = np.random.Generator(np.random.Philox(key=case.seed))
    keys = (case.batch, case.kv_heads, case.len_k)
    q = random.standard_normal((case.batch, case.heads, case.len_q, case.head_dim), np.float32)
    k = random.standard_normal((*keys, case.head_dim), np.float32)
    v = random.standard_normal((*keys, case.value_dim or case.head_dim), np.float32)
    q *= np.float32(_QUERY_STD.get(case.family, 1.0))
    v += np.float32(_VALUE_MEAN.get(case.family, 0.0))
    return Inputs(round_to_bits(q, case.dtype), round_to_bits(k, case.dtype), round_to_bits(v, case.dtype))
