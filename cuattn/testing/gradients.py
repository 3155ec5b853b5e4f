"""What a check of gradients examines: one gradient operation on the inputs of one case."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cuattn.testing.arrays import Bits, Library
from cuattn.testing.bitwise import assert_same_bits
from cuattn.testing.inputs import Case, Inputs, make_inputs
from cuattn.testing.subject import BaseSubject, Operation, Shape, Subject, accepts

#: Calls of the check of repeated runs on a device: a race shows as a rare difference.
DEVICE_RUNS = 100


@dataclass(frozen=True)
class Gradients:
    """Raw bits of the gradients of q (B, Hq, Lq, D), k (B, Hkv, Lk, D) and v (B, Hkv, Lk, Dv)."""

    q: Bits
    k: Bits
    v: Bits
    dtype: str

    @property
    def named(self) -> dict[str, Bits]:
        return {"dq": self.q, "dk": self.k, "dv": self.v}

    def __getitem__(self, index: Any) -> "Gradients":
        """The sequences of the batch that ``index`` picks."""
        return Gradients(self.q[index], self.k[index], self.v[index], self.dtype)

    def key_head(self, head: int, group: int) -> "Gradients":
        own = slice(head, head + 1)
        return Gradients(self.q[:, head * group : (head + 1) * group], self.k[:, own], self.v[:, own], self.dtype)

    def part(self, rows: Any, keys: Any) -> "Gradients":
        """Those of some rows and keys: indices into them."""
        return Gradients(self.q[:, :, rows], self.k[:, :, keys], self.v[:, :, keys], self.dtype)

    def assert_equals(self, expected: "Gradients", name: str) -> None:
        for gradient, bits in self.named.items():
            assert_same_bits(bits, expected.named[gradient], self.dtype, f"{name}: {gradient}")

    def assert_zero(self, name: str) -> None:
        """Raises BitwiseMismatch unless all are +0."""
        self.assert_equals(Gradients(0 * self.q, 0 * self.k, 0 * self.v, self.dtype), name)


class GradientSubject(BaseSubject[Gradients]):
    """Gradients: ``op(dout, q, k, v, out, lse, mask, scale=..., dlse=...) -> (dq, dk, dv)``; dlse if it takes one.

    forward: ``forward(q, k, v, mask, scale=..., return_lse=True) -> (out, lse)``, where out and lse come from; lse is
    None if forward returns none. They are computed once for all ways to ask for gradients that must agree: whether
    forward is invariant does not matter.
    runs: calls of the check of repeated runs; by default few on a CPU, and DEVICE_RUNS elsewhere.
    """

    arguments: tuple[str, ...] = ("dout", "q", "k", "v", "out", "lse")

    def __init__(
        self, forward: Operation, op: Operation, library: Library, case: Case, runs: int | None = None
    ) -> None:
        super().__init__(op, library, case)
        self.forward = forward
        self.keywords = ("dlse",) if accepts(op, "dlse") else ()
        if runs is not None:
            self.runs = runs
        elif library.device != "cpu":
            self.runs = DEVICE_RUNS

    @cached_property
    def inputs(self) -> Inputs:
        return self.attended(make_inputs(self.case, gradients=True))

    def attended(self, inputs: Inputs, mask: str | None = None) -> Inputs:
        """With the output and the LSE of these queries, keys and values."""
        result = Subject(self.forward, self.library, self.case).run(inputs, mask)
        statistics = {} if result.lse is None else {"lse": result.lse}
        return replace(inputs, upstream={**inputs.upstream, "out": result.out, **statistics})

    @property
    def judged(self) -> Inputs:
        """The inputs that decide the result: without dlse where the operation takes none."""
        upstream = {name: bits for name, bits in self.inputs.upstream.items() if name in ("dout", *self.keywords)}
        return replace(self.inputs, upstream=upstream)

    def shapes(self, inputs: Inputs) -> dict[str, Shape]:
        return {"dq": inputs.q.shape, "dk": inputs.k.shape, "dv": inputs.v.shape}

    def result(self, parts: Sequence[Bits]) -> Gradients:
        dq, dk, dv = parts
        return Gradients(dq, dk, dv, self.case.dtype)
