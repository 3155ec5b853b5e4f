"""What an invariance check examines: one operation on the inputs of one case, with results as raw bits."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cuattn.errors import CompileError, MissingDependencyError
from cuattn.testing.arrays import Bits, Library, poison, raw_bits
from cuattn.testing.bitwise import assert_same_bits
from cuattn.testing.inputs import Case, Inputs, make_inputs

#: ``op(q, k, v, mask, scale=..., return_lse=True) -> (out, lse)``; more keywords are used where it has them.
Operation = Callable[..., Any]
#: Makes an array of a library from raw bits and a dtype.
Placement = Callable[[Library, Bits, str], Any]

#: Exceptions after which there is no use in trying another case.
INSURMOUNTABLE = (CompileError, MissingDependencyError)


def accepts(op: Operation, keyword: str) -> bool:
    return keyword in inspect.signature(op).parameters


@dataclass(frozen=True)
class Result:
    """Raw bits of an output (B, Hq, Lq, D) and of its LSE (B, Hq, Lq)."""

    out: Bits
    lse: Bits
    dtype: str

    def __getitem__(self, index: Any) -> "Result":
        """Part of both: an index into (batch, head, row)."""
        return Result(self.out[index], self.lse[index], self.dtype)

    def assert_equals(self, expected: "Result", name: str) -> None:
        assert_same_bits(self.out, expected.out, self.dtype, f"{name}: out")
        assert_same_bits(self.lse, expected.lse, "float32", f"{name}: LSE")


def contiguous(library: Library, bits: Bits, dtype: str) -> Any:
    return library.array(bits, dtype)


def padded(library: Library, bits: Bits, dtype: str) -> Any:
    """(B, H, L, D) as a view into a larger array: NaN between heads, rows and behind each row, all 16-byte aligned."""
    batch, heads, rows, columns = bits.shape
    buffer = poison((batch, heads + 1, rows + 3, columns + 8), bits.itemsize)
    buffer[:, 1:, 2:-1, :-8] = bits
    return library.array(buffer, dtype)[:, 1:, 2:-1, :-8]


def rows_first(library: Library, bits: Bits, dtype: str) -> Any:
    """(B, H, L, D) as a view of memory in the order (B, L, H, D)."""
    return library.array(bits.swapaxes(1, 2), dtype).swapaxes(1, 2)


class Subject:
    """One operation on one case; `baseline` is its plain result, computed once."""

    def __init__(self, op: Operation, library: Library, case: Case) -> None:
        self.op = op
        self.library = library
        self.case = case

    @cached_property
    def inputs(self) -> Inputs:
        return make_inputs(self.case)

    @cached_property
    def baseline(self) -> Result:
        return self.run(self.inputs)

    def run(self, inputs: Inputs, mask: str | None = None, place: Placement = contiguous, **options: Any) -> Result:
        """The operation's result; ``mask`` defaults to the case's, ``options`` are further keywords for it.

        Raises AssertionError if the result has another shape or dtype than promised.
        """
        q, k, v = (place(self.library, bits, self.case.dtype) for bits in (inputs.q, inputs.k, inputs.v))
        out, lse = self.op(q, k, v, mask or self.case.mask, scale=self.case.scale, return_lse=True, **options)
        out_bits, out_dtype = raw_bits(out)
        lse_bits, lse_dtype = raw_bits(lse)
        got = (out_bits.shape, out_dtype, lse_bits.shape, lse_dtype)
        promised = (inputs.q.shape, self.case.dtype, inputs.q.shape[:3], "float32")
        if got != promised:
            raise AssertionError(f"out and LSE: got shapes and dtypes {got}, expected {promised}")
        return Result(out_bits.copy(), lse_bits.copy(), out_dtype)  # the operation may use its arrays again
