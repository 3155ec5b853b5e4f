"""What an invariance check examines: one operation on the inputs of one case, with results as raw bits."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
#: Those for a cache in the place of k and v, (B, Hkv, capacity, D), or with a block table (pages, Hkv, page_size, D).
CACHED = ("cache_lengths", "block_table", "k_new", "v_new")

#: Places in a cache, for each sequence and for all, that stay without a key: tokens, or pages.
_UNUSED = 3

#: Exceptions after which there is no use in trying another case.
INSURMOUNTABLE = (CompileError, MissingDependencyError)


@dataclass(frozen=True)
class Result:
    """Raw bits of an output (B, Hq, Lq, Dv) and of its LSE (B, Hq, Lq)."""

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


@dataclass
class Cache:
    """Keys and values of sequences in arrays of a library, with NaN wherever nothing was written."""

    k: Any
    v: Any
    table: NDArray[np.int32] | None  # (B, pages), None for a contiguous cache
    lengths: NDArray[np.int32]  # (B,)

    @classmethod
    def of(
        cls, library: Library, dtype: str, inputs: Inputs, lengths: Sequence[int], page_size: int | None = None
    ) -> "Cache":
        """The first keys of each sequence, ``lengths`` of them, with room for all and some more.

        page_size: in pages of that size and in no order, None for a contiguous cache.
        """
        batch, _, keys, _ = inputs.k.shape
        pages = keys // (page_size or 1) + 1 + _UNUSED
        table = None
        if page_size:
            order = np.random.Generator(np.random.Philox(key=0)).permutation(batch * pages + _UNUSED)
            table = order[: batch * pages].reshape(batch, pages).astype(np.int32)

        def cached(bits: Bits) -> Any:
            heads, columns = bits.shape[1], bits.shape[3]
            memory = poison((batch, heads, pages * (page_size or 1), columns), bits.itemsize)
            for item, length in enumerate(lengths):
                memory[item, :, :length] = bits[item, :, :length]
            if table is not None:
                paged = poison((batch * pages + _UNUSED, heads, page_size or 1, columns), bits.itemsize)
                paged[table] = memory.reshape(batch, heads, pages, -1, columns).swapaxes(1, 2)
                memory = paged
            return library.array(memory, dtype)

        return cls(cached(inputs.k), cached(inputs.v), table, np.array(lengths, np.int32))


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
        return self._call(arrays, mask, _shapes(inputs), options)

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
        columns = v[0].shape[3]
        result = self._call(
            (tokens(q), tokens(k), tokens(v)),
            None,
            ((total, heads, columns), (heads, total)),
            {name: int32_array(self.library, numbers) for name, numbers in starts.items()},
        )
        out, lse = result.out.swapaxes(0, 1)[None], result.lse[None]
        spans = [np.s_[:, :, first:last] for first, last in pairwise(starts["cu_seqlens_q"])]
        return [Result(out[span], lse[span], result.dtype) for span in spans]

    def run_cached(self, cache: Cache, new: Inputs) -> Result:
        """The results of query rows whose keys and values, as many, are first appended to a cache."""
        q, k, v = (contiguous(self.library, bits, self.case.dtype) for bits in (new.q, new.k, new.v))
        options = {"cache_lengths": int32_array(self.library, cache.lengths), "k_new": k, "v_new": v}
        if cache.table is not None:
            options["block_table"] = int32_array(self.library, cache.table)
        result = self._call((q, cache.k, cache.v), None, _shapes(new), options)
        cache.lengths += new.q.shape[2]
        return result

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


def _shapes(inputs: Inputs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those of the output and of the LSE."""
    rows = inputs.q.shape[:3]
    return (*rows, inputs.v.shape[3]), rows
