"""What an invariance check examines: one operation on the inputs of one case, with results as raw bits."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from cuattn.errors import CompileError, MissingDependencyError
from cuattn.testing.arrays import Bits, Library, int32_array, poison, raw_bits
from cuattn.testing.bitwise import assert_same_bits
from cuattn.testing.inputs import Case, Inputs, make_inputs

#: ``op(q, k, v, mask, scale=..., return_lse=True) -> (out, lse)``; more keywords are used where it has them.
Operation = Callable[..., Any]
#: Makes an array of a library from raw bits and a dtype.
Placement = Callable[[Library, Bits, str], Any]

#: The keywords for cumulative lengths: with them q is (Tq, Hq, D), k and v (Tk, Hkv, D), out like q, the LSE (Hq, Tq).
CUMULATIVE = ("cu_seqlens_q", "cu_seqlens_k")

#: Exceptions after which there is no use in trying another case.
INSURMOUNTABLE = (CompileError, MissingDependencyError)


def accepts(op: Operation, keyword: str) -> bool:
    return keyword in inspect.signature(op).parameters


def with_packed(op: Operation, packed: Operation) -> Operation:
    """``op`` that also takes packed sequences, by the keywords cu_seqlens_q and cu_seqlens_k: those calls are
    ``packed(q, k, v, cu_seqlens_q, cu_seqlens_k, mask, ...)``.
    """

    @functools.wraps(op)
    def either(
        q: Any, k: Any, v: Any, *args: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, **options: Any
    ) -> Any:
        if cu_seqlens_q is None:
            return op(q, k, v, *args, **options)
        return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, *args, **options)

    signature = inspect.signature(op)
    keywords = {name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in CUMULATIVE}
    own = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD and p.name not in keywords]
    either.__signature__ = signature.replace(parameters=[*own, *keywords.values()])  # type: ignore[attr-defined]
    return either


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
        arrays = (place(self.library, bits, self.case.dtype) for bits in (inputs.q, inputs.k, inputs.v))
        return self._call(arrays, mask, (inputs.q.shape, inputs.q.shape[:3]), options)

    def run_packed(self, sequences: Sequence[Inputs]) -> list[Result]:
        """The results of sequences, each of batch size 1, that are packed into one call."""

        def tokens(bits: list[Bits]) -> Any:
            packed = np.concatenate([one[0].swapaxes(0, 1) for one in bits])
            return self.library.array(packed, self.case.dtype)

        q, k, v = ([getattr(one, name) for one in sequences] for name in "qkv")
        starts = {
            name: list(accumulate((one.shape[2] for one in bits), initial=0))
            for name, bits in zip(CUMULATIVE, (q, k), strict=True)
        }
        total, heads = starts["cu_seqlens_q"][-1], self.case.heads
        result = self._call(
            (tokens(q), tokens(k), tokens(v)),
            None,
            ((total, heads, self.case.head_dim), (heads, total)),
            {name: int32_array(self.library, numbers) for name, numbers in starts.items()},
        )
        out, lse = result.out.swapaxes(0, 1)[None], result.lse[None]
        spans = [np.s_[:, :, first:last] for first, last in pairwise(starts["cu_seqlens_q"])]
        return [Result(out[span], lse[span], result.dtype) for span in spans]

    def _call(
        self, arrays: Iterable[Any], mask: str | None, shapes: tuple[Any, Any], options: dict[str, Any]
    ) -> Result:
        """``shapes`` are those of the output and of the LSE."""
        out, lse = self.op(*arrays, mask or self.case.mask, scale=self.case.scale, return_lse=True, **options)
        out_bits, out_dtype = raw_bits(out)
        lse_bits, lse_dtype = raw_bits(lse)
        got = (out_bits.shape, out_dtype, lse_bits.shape, lse_dtype)
        promised = (shapes[0], self.case.dtype, shapes[1], "float32")
        if got != promised:
            raise AssertionError(f"out and LSE: got shapes and dtypes {got}, expected {promised}")
        return Result(out_bits.copy(), lse_bits.copy(), out_dtype)  # the operation may use its arrays again
