"""`cuattn.attention_backward` and its packed twin against float64, and the promise for their bits.

The output and the LSE that they take come from the reference, whichever backend computes the gradients; where accuracy
is measured, from the same backend.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from backends import REFERENCE, SM_80, SM_90A, attention_on, gradients_on

import cuattn
from cuattn import testing
from cuattn.reference.gold import gold_gradients
from cuattn.testing import GRADIENT_CHECKS, Case, NumpyLibrary, TorchLibrary
from cuattn.testing.accuracy import relative_error
from cuattn.testing.arrays import raw_bits, values_of
from cuattn.testing.bitwise import assert_same_bits
from cuattn.testing.inputs import Inputs

#: Where the tests run, and with which dtype: one more line tests one more backend.
RUNS = [
    (REFERENCE, "float16"),
    (REFERENCE, "bfloat16"),
    (REFERENCE, "float32"),
    (SM_80, "float16"),
    (SM_90A, "bfloat16"),
    (SM_90A, "float32"),
]
Run = tuple[tuple[str, str | None], str]


def name_of(run: Run) -> str:
    return "-".join(filter(None, (*run[0], run[1])))


everywhere = pytest.mark.parametrize("run", RUNS, ids=name_of)
both_masks = pytest.mark.parametrize("mask", ["full", "causal"])
#: Largest relative L2 error on normal numbers.
LIMIT = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 3e-6}
FORWARD = attention_on(REFERENCE)
BASE = Case(21, 40, batch=2, heads=4, kv_heads=2)
LIBRARY = NumpyLibrary()


def numbers(bits: Any, dtype: str) -> np.ndarray:
    return values_of(bits, dtype).astype(np.float64)


def arrays_of(inputs: Inputs, dtype: str) -> dict[str, Any]:
    return {name: LIBRARY.array(x, dtype if x.ndim == 4 else "float32") for name, x in inputs.named.items()}


def gradients(run: Run, case: Case, inputs: Inputs, dlse: bool = True, **options: Any) -> list[Any]:
    """Raw bits of dq, dk and dv."""
    arrays = arrays_of(inputs, case.dtype)
    q, k, v, dout = (arrays[name] for name in ("q", "k", "v", "dout"))
    out, lse = FORWARD(q, k, v, case.mask, scale=case.scale, return_lse=True, **options)
    options["dlse"] = arrays["dlse"] if dlse else None
    results = gradients_on(run[0])(dout, q, k, v, out, lse, case.mask, scale=case.scale, **options)
    return [raw_bits(x)[0] for x in results]


def expected(case: Case, inputs: Inputs, dlse: bool = True, exists: Any = None) -> list[np.ndarray]:
    exact = {name: numbers(x, case.dtype if x.ndim == 4 else "float32") for name, x in inputs.named.items()}
    arrays = (exact[name] for name in ("dout", "q", "k", "v"))
    return list(gold_gradients(*arrays, case.mask, case.scale, exists, exact["dlse"] if dlse else None))


def assert_near(got: list[Any], gold: list[np.ndarray], dtype: str) -> None:
    for name, bits, right in zip(("dq", "dk", "dv"), got, gold, strict=True):
        assert bits.shape == right.shape
        assert relative_error(numbers(bits, dtype), right) <= LIMIT[dtype], name


def padded(case: Case, exists: np.ndarray) -> Inputs:
    """Inputs with NaN in the keys and values that do not exist."""
    inputs = testing.make_inputs(case, gradients=True)
    k, v = inputs.k.copy(), inputs.v.copy()
    for item, own in enumerate(exists):
        k[item][:, ~own] = v[item][:, ~own] = np.iinfo(k.dtype).max
    return replace(inputs, k=k, v=v)


@everywhere
@both_masks
class TestAgainstGold:
    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"kv_heads": 1},
            {"heads": 2},
            {"len_q": 40, "len_k": 21},  # causal: rows that see nothing
            {"len_q": 70, "len_k": 150, "batch": 1},
            {"scale": -0.2},
            {"seed": 3, "batch": 3},
        ],
        ids=str,
    )
    def test_shapes(self, run: Run, mask: str, change: dict[str, Any]) -> None:
        case = replace(BASE, dtype=run[1], mask=mask, **change)
        inputs = testing.make_inputs(case, gradients=True)
        assert_near(gradients(run, case, inputs), expected(case, inputs), case.dtype)

    def test_without_dlse(self, run: Run, mask: str) -> None:
        """None is zeros, bit for bit."""
        case = replace(BASE, dtype=run[1], mask=mask)
        inputs = testing.make_inputs(case, gradients=True)
        without = gradients(run, case, inputs, dlse=False)
        assert_near(without, expected(case, inputs, dlse=False), case.dtype)
        inputs.upstream["dlse"][...] = 0
        for one, other in zip(gradients(run, case, inputs), without, strict=True):
            assert_same_bits(one, other, case.dtype)

    def test_dlse_alone(self, run: Run, mask: str) -> None:
        case = replace(BASE, dtype=run[1], mask=mask)
        inputs = testing.make_inputs(case, gradients=True)
        inputs.upstream["dout"][...] = 0
        got = gradients(run, case, inputs)
        assert_near(got, expected(case, inputs), case.dtype)
        assert not got[2].any()

    def test_a_scale_of_zero(self, run: Run, mask: str) -> None:
        """All weights are the same, and no score matters."""
        case = replace(BASE, dtype=run[1], mask=mask, scale=0.0)
        inputs = testing.make_inputs(case, gradients=True)
        got = gradients(run, case, inputs)
        assert_near(got, expected(case, inputs), case.dtype)
        assert not got[0].any()
        assert not got[1].any()

    def test_nothing_contributes(self, run: Run, mask: str) -> None:
        case = replace(BASE, dtype=run[1], mask=mask)
        inputs = testing.make_inputs(case, gradients=True)
        for bits in inputs.upstream.values():
            bits[...] = 0
        inputs.q[...] = np.iinfo(inputs.q.dtype).max
        assert not any(bits.any() for bits in gradients(run, case, inputs))

    @pytest.mark.parametrize("name", ["right", "left", "holes", "none", "all", "single"])
    def test_key_padding_mask(self, run: Run, mask: str, name: str) -> None:
        case = replace(BASE, dtype=run[1], mask=mask)
        place = np.arange(case.len_k)
        missing = np.array([[7], [25]])
        exists = {
            "right": place < case.len_k - missing,
            "left": place >= missing,
            "holes": (place % 7 != 2) & (place // 5 != missing // 5),
            "none": np.zeros((2, case.len_k), bool),
            "all": np.ones((2, case.len_k), bool),
            "single": place == 39 - missing,
        }[name]
        inputs = padded(case, exists)
        got = gradients(run, case, inputs, key_padding_mask=exists)
        if name != "single":  # of one key what is left is rounding
            assert_near(got, expected(case, inputs, exists=exists), case.dtype)
        for item, own in enumerate(exists):
            assert not any(bits[item][:, ~own].any() for bits in got[1:])
            assert np.isfinite(numbers(got[1][item], case.dtype)).all()
        if name == "all":
            for one, other in zip(got, gradients(run, case, inputs), strict=True):
                assert_same_bits(one, other, case.dtype)

    @pytest.mark.parametrize("lengths", [(40, 33), (16, 0), (5, 1)])
    def test_kv_lengths(self, run: Run, mask: str, lengths: tuple[int, int]) -> None:
        """As with the mask of the same keys, bit for bit."""
        case = replace(BASE, dtype=run[1], mask=mask)
        exists = np.arange(case.len_k) < np.array(lengths)[:, None]
        inputs = padded(case, exists)
        got = gradients(run, case, inputs, kv_lengths=np.array(lengths, np.int32))
        assert_near(got, expected(case, inputs, exists=exists), case.dtype)
        for one, other in zip(got, gradients(run, case, inputs, key_padding_mask=exists), strict=True):
            assert_same_bits(one, other, case.dtype)
        for item, length in enumerate(lengths):
            assert not any(bits[item, :, length:].any() for bits in got[1:])

    def test_rows_that_see_nothing_are_not_read(self, run: Run, mask: str) -> None:
        case = replace(BASE, dtype=run[1], mask="causal", len_q=40, len_k=21)
        if mask == "full":  # no row sees a key of the second sequence
            case = replace(BASE, dtype=run[1], mask=mask)
        inputs = testing.make_inputs(case, gradients=True)
        blind = np.s_[:, :, :19] if mask == "causal" else np.s_[1:]
        lengths = {} if mask == "causal" else {"kv_lengths": np.array([40, 0], np.int32)}
        clean = gradients(run, case, inputs, **lengths)
        for bits in (inputs.q, *inputs.upstream.values()):
            bits[blind] = np.iinfo(bits.dtype).max
        got = gradients(run, case, inputs, **lengths)
        assert not got[0][blind].any()
        for one, other in zip(got, clean, strict=True):
            assert_same_bits(one, other, case.dtype)


@everywhere
@both_masks
def test_packed_sequences(run: Run, mask: str) -> None:
    """Empty ones, without rows, without keys, of one token, and of more."""
    dtype = run[1]
    lengths_q, lengths_k = [5, 0, 1, 0, 33, 1, 20], [7, 0, 1, 3, 33, 0, 9]
    case = Case(sum(lengths_q), sum(lengths_k), mask, dtype, heads=4, kv_heads=2)
    inputs = testing.make_inputs(case, gradients=True)
    starts_q, starts_k = (np.cumsum([0, *x]) for x in (lengths_q, lengths_k))
    spans = list(zip(pairwise(starts_q), pairwise(starts_k), strict=True))
    each = [inputs.rows(slice(*rows)).keys(slice(*keys)) for rows, keys in spans]

    def tokens(array: Any) -> Any:
        return np.ascontiguousarray(array[0].swapaxes(0, 1))

    arrays = arrays_of(inputs, dtype)
    q, k, v, dout = (tokens(arrays[name]) for name in ("q", "k", "v", "dout"))
    options = {"cu_seqlens_q": starts_q.astype(np.int32), "cu_seqlens_k": starts_k.astype(np.int32)}
    out, lse = FORWARD(q, k, v, mask, return_lse=True, **options)
    results = gradients_on(run[0])(dout, q, k, v, out, lse, mask, dlse=arrays["dlse"][0], **options)
    got = [raw_bits(x)[0].swapaxes(0, 1)[None] for x in results]
    gold = [np.zeros(bits.shape) for bits in got]
    for (rows, keys), one in zip(spans, each, strict=True):
        if one.q.size and one.k.size:
            for whole, part, span in zip(gold, expected(case, one), (rows, keys, keys), strict=True):
                whole[:, :, slice(*span)] = part
    assert_near(got, gold, dtype)
    for (rows, keys), one in zip(spans, each, strict=True):
        for whole, part, span in zip(got, gradients(run, case, one), (rows, keys, keys), strict=True):
            assert_same_bits(whole[:, :, slice(*span)], part, dtype)


@everywhere
@pytest.mark.parametrize("shape", [(0, 4, 2, 5, 7), (2, 0, 0, 5, 7), (2, 4, 2, 0, 7), (2, 4, 2, 5, 0), (0, 0, 0, 0, 0)])
def test_nothing(run: Run, shape: tuple[int, ...]) -> None:
    """No batch, no heads, no rows, no keys."""
    batch, heads, kv_heads, len_q, len_k = shape
    case = Case(len_q, len_k, "full", run[1], batch=batch, heads=heads, kv_heads=kv_heads)
    inputs = testing.make_inputs(case, gradients=True)
    for bits, like in zip(gradients(run, case, inputs), (inputs.q, inputs.k, inputs.v), strict=True):
        assert bits.shape == like.shape
        assert not bits.any()
    padded_keys = gradients(run, case, inputs, key_padding_mask=np.ones((batch, len_k), bool))
    assert not any(bits.any() for bits in padded_keys)


@pytest.mark.parametrize("run", [*RUNS[:3], (SM_80, "float16"), (SM_90A, "float32")], ids=name_of)
@pytest.mark.parametrize(("head_dim", "value_dim", "mask"), [(24, 40, "causal"), (72, 16, "full")])
def test_head_dims(run: Run, head_dim: int, value_dim: int, mask: str) -> None:
    """Those of values may differ; both may be no multiple of 16."""
    case = replace(BASE, mask=mask, dtype=run[1], head_dim=head_dim, value_dim=value_dim)
    inputs = testing.make_inputs(case, gradients=True)
    assert_near(gradients(run, case, inputs), expected(case, inputs), case.dtype)


@everywhere
@both_masks
def test_invariance(run: Run, mask: str) -> None:
    """Every check passes, and every check finds its negative control out."""
    if run[0] != REFERENCE and (run[1] == "bfloat16") != (mask == "full"):
        return  # which takes long: one mask each
    backward, case = gradients_on(run[0]), Case(17, 80, mask, run[1], batch=2, heads=4, kv_heads=2)
    names = {trial.check.name for trial in testing.plan_sweep(backward, [case], GRADIENT_CHECKS)}
    assert names == {check.name for check in GRADIENT_CHECKS if check.applies(case)}
    testing.assert_gradient_batch_invariant(backward, FORWARD, [case], TorchLibrary())


@everywhere
@pytest.mark.parametrize("family", ["normal", "peaked 16", "large mean"])
def test_accuracy(run: Run, family: str) -> None:
    case = Case(128, 128, "causal", run[1], family=family)
    testing.assert_gradients_accurate(gradients_on(run[0]), attention_on(run[0]), case, TorchLibrary())


class TestArrays:
    """What comes in may be of any library, and what comes out is like it."""

    @staticmethod
    def expected() -> list[np.ndarray]:
        case = replace(BASE, dtype="bfloat16")
        return [x.view(ml_dtypes.bfloat16) for x in gradients(RUNS[1], case, testing.make_inputs(case, gradients=True))]

    @staticmethod
    def arrays(library: Any) -> list[Any]:
        inputs = testing.make_inputs(replace(BASE, dtype="bfloat16"), gradients=True)
        return [library.array(inputs.named[x], "bfloat16") for x in ("dout", "q", "k", "v")] + [
            library.array(inputs.upstream["dlse"], "float32")
        ]

    def check(self, arrays: list[Any], kind: type) -> None:
        dout, q, k, v, dlse = arrays
        out, lse = cuattn.attention(q, k, v, "causal", return_lse=True)
        results = cuattn.attention_backward(dout, q, k, v, out, lse, "causal", dlse=dlse)
        assert isinstance(results, tuple)
        for result, right, like in zip(results, self.expected(), (q, k, v), strict=True):
            assert isinstance(result, kind)
            assert (result.dtype, result.shape) == (like.dtype, like.shape)
            testing.assert_bitwise_equal(result, right)

    def test_torch(self) -> None:
        self.check(self.arrays(TorchLibrary()), torch.Tensor)

    def test_numpy(self) -> None:
        self.check(self.arrays(LIBRARY), np.ndarray)

    def test_jax(self) -> None:
        self.check([jnp.asarray(x) for x in self.arrays(LIBRARY)], jnp.ndarray)

    def test_results_are_new_contiguous_memory(self) -> None:
        """Also where the inputs are views, or all the same array."""
        x = self.arrays(LIBRARY)[1].swapaxes(1, 2)
        out, lse = cuattn.attention(x, x, x, return_lse=True, layout="bshd")
        results = cuattn.attention_backward(x, x, x, x, out, lse, layout="bshd")
        for index, result in enumerate(results):
            assert result.shape == x.shape
            assert result.flags.c_contiguous
            assert not np.shares_memory(result, x)
            assert not any(np.shares_memory(result, other) for other in results[:index])

    def test_inputs_are_not_written(self) -> None:
        arrays = self.arrays(LIBRARY)
        before = [x.copy() for x in arrays]
        self.check(arrays, np.ndarray)
        for one, other in zip(arrays, before, strict=True):
            testing.assert_bitwise_equal(one, other)
