"""What an invariance check examines: one operation on the inputs of one case, with results as raw bits."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cuattn.errors import CompileError, MissingDependencyError
from cuattn.testing.arrays import Bits, Library, int32_array, poison, raw_bits
from cuattn.testing.bitwise import assert_same_bits
from cuattn.testing.inputs import Case, Inputs, make_inputs

#: ``op(q, k, v, mask, scale=..., return_lse=True) -> (out, lse)``; more keywords are used where it has them. One
#: without the keyword return_lse returns out alone.
Operation = Callable[..., Any]
Shape = tuple[int, ...]
R = TypeVar("R", bound="Compared")
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
#: All others fail what was tried, and so does an operation that would end the process.
FAILURES = (Exception, SystemExit)


def accepts(op: Operation, keyword: str) -> bool:
    return keyword in inspect.signature(op).parameters


def returns_lse(op: Operation) -> bool:
    """Whether an operation can be asked for the LSE."""
    parameters = inspect.signature(op).parameters
    return "return_lse" in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


class Compared(Protocol):
    """The results of a call, as raw bits."""

    def __getitem__(self: R, index: Any) -> R:
        """The sequences of the batch that ``index`` picks."""

    def key_head(self: R, head: int, group: int) -> R:
        """What belongs to one key head and its group of query heads."""

    def assert_equals(self: R, expected: R, name: str) -> None:
        """Raises BitwiseMismatch, which begins with ``name``, for other bits."""


@dataclass(frozen=True)
class Result:
    """Raw bits of an output (B, Hq, Lq, Dv) and of its LSE (B, Hq, Lq), None if the operation returns none."""

    out: Bits
    lse: Bits | None
    dtype: str

    def __getitem__(self, index: Any) -> "Result":
        """Part of both: an index into (batch, head, row)."""
        return Result(self.out[index], None if self.lse is None else self.lse[index], self.dtype)

    def key_head(self, head: int, group: int) -> "Result":
        return self[:, head * group : (head + 1) * group]

    def assert_equals(self, expected: "Result", name: str) -> None:
        assert_same_bits(self.out, expected.out, self.dtype, f"{name}: out")
        if self.lse is not None and expected.lse is not None:
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


class BaseSubject(ABC, Generic[R]):
    """One operation on one case; `baseline` is its plain result, computed once."""

    #: The operation's positional arguments before the mask, and arguments by keyword: names in `Inputs.named`.
    arguments: tuple[str, ...] = ("q", "k", "v")
    keywords: tuple[str, ...] = ()
    #: Further keywords of every call.
    always: Mapping[str, Any] = {}
    #: Calls of the check of repeated runs.
    runs = 4

    def __init__(self, op: Operation, library: Library, case: Case) -> None:
        self.op = op
        self.library = library
        self.case = case

    @cached_property
    def inputs(self) -> Inputs:
        return make_inputs(self.case)

    @cached_property
    def baseline(self) -> R:
        return self.run(self.inputs)

    @abstractmethod
    def shapes(self, inputs: Inputs) -> dict[str, Shape]:
        """The names and shapes of the results, (B, H, L, D) or, of fp32 numbers, (B, H, L)."""

    @abstractmethod
    def result(self, parts: Sequence[Bits]) -> R:
        """The results, made of raw bits of these shapes."""

    def run(
        self,
        inputs: Inputs,
        mask: str | None = None,
        place: Placement = contiguous,
        layout: str = "bhsd",
        **options: Any,
    ) -> R:
        """The operation's result; ``mask`` defaults to the case's, ``options`` are further keywords for it.

        Raises AssertionError if the result has another shape or dtype than promised.
        """
        swapped = layout == "bshd"

        def placed(bits: Bits) -> Any:
            if bits.ndim == 3:
                return self.library.array(bits, "float32")
            array = place(self.library, bits, self.case.dtype)
            return array.swapaxes(1, 2) if swapped else array

        def turned(shape: Shape) -> Shape:
            return (shape[0], shape[2], shape[1], shape[3]) if swapped and len(shape) == 4 else shape

        if swapped:
            options["layout"] = layout
        shapes = {name: turned(shape) for name, shape in self.shapes(inputs).items()}
        parts = self._call({name: placed(bits) for name, bits in inputs.named.items()}, mask, shapes, options)
        return self.result([bits.swapaxes(1, 2) if swapped and bits.ndim == 4 else bits for bits in parts])

    def run_packed(self, sequences: Sequence[Inputs]) -> list[R]:
        """The results of sequences, each of batch size 1, that are packed into one call."""

        def packed(name: str) -> Any:
            parts = [one.named[name][0] for one in sequences]
            if parts[0].ndim == 2:  # (heads, rows) of fp32 numbers
                return self.library.array(np.concatenate(parts, axis=1), "float32")
            return self.library.array(np.concatenate([part.swapaxes(0, 1) for part in parts]), self.case.dtype)

        def joined(shapes: Sequence[Shape]) -> Shape:
            _, heads, _, *columns = shapes[0]
            total = sum(shape[2] for shape in shapes)
            return (total, heads, *columns) if columns else (heads, total)

        shapes = [self.shapes(one) for one in sequences]
        together = {name: joined([each[name] for each in shapes]) for name in shapes[0]}
        starts = {
            name: int32_array(self.library, list(accumulate((one.named[x].shape[2] for one in sequences), initial=0)))
            for name, x in zip(CUMULATIVE, "qk", strict=True)
        }
        parts = self._call({name: packed(name) for name in sequences[0].named}, None, together, starts)
        cut = []
        for name, bits in zip(together, parts, strict=True):
            whole = (bits.swapaxes(0, 1) if bits.ndim == 3 else bits)[None]
            ends = list(accumulate((each[name][2] for each in shapes), initial=0))
            cut.append([whole[:, :, first:last] for first, last in pairwise(ends)])
        return [self.result(part) for part in zip(*cut, strict=True)]

    def _call(
        self, named: Mapping[str, Any], mask: str | None, shapes: Mapping[str, Shape], options: Mapping[str, Any]
    ) -> list[Bits]:
        """``named`` holds the arguments, ``shapes`` the names and shapes of the results."""
        options = {**self.always, **{name: named[name] for name in self.keywords}, **options}
        results = self.op(
            *(named.get(name) for name in self.arguments), mask or self.case.mask, scale=self.case.scale, **options
        )
        found = [raw_bits(array) for array in (results if len(shapes) > 1 else [results])]
        got = tuple(x for bits, dtype in found for x in (bits.shape, dtype))
        promised = tuple(
            x for name, shape in shapes.items() for x in (shape, "float32" if name == "LSE" else self.case.dtype)
        )
        if got != promised:
            *first, last = shapes
            names = f"{', '.join(first)} and {last}" if first else last
            raise AssertionError(f"{names}: got shapes and dtypes {got}, expected {promised}")
        return [bits.copy() for bits, _ in found]  # the operation may use its arrays again


class Subject(BaseSubject[Result]):
    """Attention: ``op(q, k, v, mask, scale=..., return_lse=True) -> (out, lse)``; out alone without return_lse."""

    def __init__(self, op: Operation, library: Library, case: Case) -> None:
        super().__init__(op, library, case)
        self.has_lse = returns_lse(op)
        self.always = {"return_lse": True} if self.has_lse else {}

    def shapes(self, inputs: Inputs) -> dict[str, Shape]:
        rows = inputs.q.shape[:3]
        out = {"out": (*rows, inputs.v.shape[3])}
        return {**out, "LSE": rows} if self.has_lse else out

    def result(self, parts: Sequence[Bits]) -> Result:
        return Result(parts[0], parts[1] if self.has_lse else None, self.case.dtype)

    def run_cached(self, cache: Cache, new: Inputs) -> Result:
        """The results of query rows whose keys and values, as many, are first appended to a cache."""
        q, k, v = (contiguous(self.library, bits, self.case.dtype) for bits in (new.q, new.k, new.v))
        options = {"cache_lengths": int32_array(self.library, cache.lengths), "k_new": k, "v_new": v}
        if cache.table is not None:
            options["block_table"] = int32_array(self.library, cache.table)
        parts = self._call({"q": q, "k": cache.k, "v": cache.v}, None, self.shapes(new), options)
        cache.lengths += new.q.shape[2]
        return self.result(parts)
