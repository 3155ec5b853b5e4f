"""Packed and right-padded batches, and each of their sequences alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
from backends import REFERENCE, SM_80, SM_86, SM_90A, backend_params

import cuattn
from cuattn import testing
from cuattn.testing import Case, Library, NumpyLibrary
from cuattn.testing.arrays import Bits, int32_array, poison, raw_bits
from cuattn.testing.bitwise import assert_same_bits
from cuattn.testing.subject import Operation

on_every_cpu = pytest.mark.parametrize("attention", backend_params(REFERENCE, SM_80, SM_86, SM_90A))
#: `cuattn.attention` that also takes packed sequences, on the backend that is active.
both_forms = testing.with_packed(cuattn.attention, cuattn.attention_varlen)

Both = tuple[Bits, Bits]


@dataclass(frozen=True)
class Packed:
    """Sequences of these lengths, packed; rows and keys are independent of how they are cut into sequences."""

    queries: Sequence[int]
    keys: Sequence[int]
    mask: str = "causal"
    dtype: str = "float16"
    head_dim: int = 64
    heads: int = 2
    kv_heads: int = 1
    scale: float | None = None
    seed: int = 0

    @property
    def bits(self) -> list[Bits]:
        """q (Tq, Hq, D), k and v (Tk, Hkv, D)."""
        case = Case(
            sum(self.queries),
            sum(self.keys),
            dtype=self.dtype,
            head_dim=self.head_dim,
            heads=self.heads,
            kv_heads=self.kv_heads,
            seed=self.seed,
        )
        inputs = testing.make_inputs(case)
        return [np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in (inputs.q, inputs.k, inputs.v)]

    def arrays(self, library: Library) -> list[Any]:
        return [library.array(x, self.dtype) for x in self.bits]

    def lengths(self, library: Library) -> dict[str, Any]:
        """The keywords that say where sequences start."""
        starts = {"cu_seqlens_q": self.queries, "cu_seqlens_k": self.keys}
        return {name: int32_array(library, starts_of(lengths)) for name, lengths in starts.items()}

    def together(self, attention: Operation, library: Library, arrays: Sequence[Any] | None = None) -> Both:
        """Raw bits of the output (Tq, Hq, D) and of the LSE (Hq, Tq)."""
        arrays = arrays or self.arrays(library)
        result = attention(*arrays, self.mask, scale=self.scale, return_lse=True, **self.lengths(library))
        return bits_of(result)

    def alone(self, attention: Operation, library: Library, arrays: Sequence[Any] | None = None) -> Both:
        """The same of a call for each sequence."""
        q, k, v = arrays or self.arrays(library)
        outs, lses = [raw_bits(q)[0][:0]], [np.zeros((self.heads, 0), np.uint32)]
        for rows, keys in zip(pairwise(starts_of(self.queries)), pairwise(starts_of(self.keys)), strict=True):
            one = (x[slice(*span)][None] for x, span in ((q, rows), (k, keys), (v, keys)))
            out, lse = bits_of(attention(*one, self.mask, scale=self.scale, return_lse=True, layout="bshd"))
            outs.append(out[0])
            lses.append(lse[0])
        return np.concatenate(outs), np.concatenate(lses, axis=1)

    def check(self, attention: Operation, library: Library | None = None, by: Operation | None = None) -> None:
        """Together like each alone, which ``by`` computes if given."""
        library = library or NumpyLibrary()
        assert_both_equal(self.together(attention, library), self.alone(by or attention, library), self.dtype)


@dataclass(frozen=True)
class RightPadded:
    """A batch of q (B, Hq, Lq, D), k and v (B, Hkv, Lk, D), of which sequence b has the first lengths[b] keys."""

    case: Case
    lengths: Sequence[int]

    def bits(self, garbage: Callable[[tuple[int, ...]], Bits] | None = None) -> list[Bits]:
        """q, k, v; ``garbage`` makes what stands in keys and values that do not exist, from a shape."""
        inputs = testing.make_inputs(self.case)
        k, v = inputs.k.copy(), inputs.v.copy()
        for item, length in enumerate(self.lengths):
            for bits in (k, v) if garbage else ():
                bits[item, :, length:] = garbage(bits[item, :, length:].shape)  # type: ignore[misc]
        return [inputs.q, k, v]

    def together(self, attention: Operation, library: Library, bits: list[Bits], layout: str = "bhsd") -> Both:
        case = self.case
        arrays = [library.array(x if layout == "bhsd" else x.swapaxes(1, 2), case.dtype) for x in bits]
        lengths = int32_array(library, self.lengths)
        out, lse = bits_of(
            attention(*arrays, case.mask, scale=case.scale, return_lse=True, layout=layout, kv_lengths=lengths)
        )
        return (out if layout == "bhsd" else out.swapaxes(1, 2)), lse

    def alone(self, attention: Operation, library: Library) -> Both:
        """Every sequence with the keys it has: row i sees min(length, Lk - Lq + i + 1) of them if causal."""
        case, inputs = self.case, testing.make_inputs(self.case)
        out, lse = poison(inputs.q.shape, 2), poison(inputs.q.shape[:3], 4)
        for item, length in enumerate(self.lengths):
            one = inputs.items([item]).with_keys(length)
            # rows before `cut` see what a causal row of the shorter sequence sees, the others all its keys
            cut = 0 if case.mask == "full" else max(0, case.len_q - (case.len_k - length))
            for mask, first, last in ((case.mask, 0, cut), ("full", cut, case.len_q)):
                part = one.with_rows(first, last)
                arrays = (library.array(x, case.dtype) for x in (part.q, part.k, part.v))
                rows = np.s_[item : item + 1, :, first:last]
                out[rows], lse[rows] = bits_of(attention(*arrays, mask, scale=case.scale, return_lse=True))
        return out, lse


def starts_of(lengths: Sequence[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))


def bits_of(result: tuple[Any, Any]) -> Both:
    return raw_bits(result[0])[0], raw_bits(result[1])[0]


def assert_both_equal(actual: Both, expected: Both, dtype: str, name: str = "") -> None:
    assert_same_bits(actual[0], expected[0], dtype, f"{name} out")
    assert_same_bits(actual[1], expected[1], "float32", f"{name} LSE")


def garbage(kind: str, dtype: str) -> Callable[[tuple[int, ...]], Bits]:
    """Makes words of NaN, infinities of both signs, or the largest numbers of both signs."""
    words = {
        "NaN": [0xFFFF, 0x7FFF],
        "infinities": {"float16": [0x7C00, 0xFC00], "bfloat16": [0x7F80, 0xFF80]}[dtype],
        "huge": {"float16": [0x7BFF, 0xFBFF], "bfloat16": [0x7F7F, 0xFF7F]}[dtype],
    }[kind]
    return lambda shape: np.resize(np.array(words, np.uint16), shape)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)
