"""Cases and their inputs: a counter-based generator, a seed, one rounding.

They are the same wherever NumPy's ``standard_normal`` is, which a version of NumPy may change; the inputs of
`cuattn.testing.workload` are the same everywhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
    """Raw bits of q (B, Hq, Lq, D), k (B, Hkv, Lk, D) and v (B, Hkv, Lk, Dv).

    upstream: what else a backward pass takes of each row: dout and out (B, Hq, Lq, Dv), fp32 dlse and lse (B, Hq, Lq).
    """

    q: Bits
    k: Bits
    v: Bits
    upstream: Mapping[str, Bits] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, Bits]:
        return {"q": self.q, "k": self.k, "v": self.v, **self.upstream}

    def each(self, change: Callable[[Bits], Bits]) -> "Inputs":
        """All arrays changed in the same way."""
        return Inputs(**{x: change(getattr(self, x)) for x in "qkv"}, upstream=_each(self.upstream, change))

    def items(self, index: slice | list[int]) -> "Inputs":
        """The sequences of the batch that ``index`` picks."""
        return self.each(lambda bits: bits[index])

    def with_keys(self, count: int) -> "Inputs":
        """The first ``count`` keys."""
        return self.keys(slice(count))

    def keys(self, index: slice | NDArray[Any]) -> "Inputs":
        """The keys that ``index`` picks."""
        return replace(self, k=self.k[:, :, index], v=self.v[:, :, index])

    def with_rows(self, first: int, last: int) -> "Inputs":
        """The query rows from ``first`` up to but not including ``last``."""
        return self.rows(slice(first, last))

    def rows(self, index: slice | NDArray[Any]) -> "Inputs":
        """The query rows that ``index`` picks."""
        return replace(self, q=self.q[:, :, index], upstream=_each(self.upstream, lambda bits: bits[:, :, index]))

    def key_head(self, head: int) -> "Inputs":
        """One key head with its group of query heads."""
        group, own = self.q.shape[1] // self.k.shape[1], np.s_[:, head : head + 1]
        queries = np.s_[:, head * group : (head + 1) * group]
        return Inputs(self.q[queries], self.k[own], self.v[own], _each(self.upstream, lambda bits: bits[queries]))


def _each(named: Mapping[str, Bits], change: Callable[[Bits], Bits]) -> dict[str, Bits]:
    return {name: change(bits) for name, bits in named.items()}


def make_inputs(case: Case, gradients: bool = False) -> Inputs:
    """The inputs of a case; with ``gradients`` dout and dlse too, normal numbers.

    Raises ValueError for an unknown family.
    """
    if case.family not in FAMILIES:
        raise ValueError(f"family: got {case.family!r}, expected one of {', '.join(map(repr, FAMILIES))}")
    random = np.random.Generator(np.random.Philox(key=case.seed))
    rows, keys = (case.batch, case.heads, case.len_q), (case.batch, case.kv_heads, case.len_k)
    value_dim = case.value_dim or case.head_dim
    q = random.standard_normal((*rows, case.head_dim), np.float32)
    k = random.standard_normal((*keys, case.head_dim), np.float32)
    v = random.standard_normal((*keys, value_dim), np.float32)
    q *= np.float32(_QUERY_STD.get(case.family, 1.0))
    v += np.float32(_VALUE_MEAN.get(case.family, 0.0))
    q, k, v = (round_to_bits(x, case.dtype) for x in (q, k, v))
    upstream = {}
    if gradients:
        upstream["dout"] = round_to_bits(random.standard_normal((*rows, value_dim), np.float32), case.dtype)
        upstream["dlse"] = random.standard_normal(rows, np.float32).view(np.uint32)
    return Inputs(q, k, v, upstream)
