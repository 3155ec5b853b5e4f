"""What `cuattn.attention` computes on a CPU: accuracy, special values, layouts, array libraries."""

import math
import mmap
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from backends import REFERENCE, SM_80, attention_on, backend_params, on_every_backend

from cuattn import testing
from cuattn.testing import Case, NumpyLibrary, Subject, TorchLibrary, assert_bitwise_equal
from cuattn.testing.arrays import raw_bits, values_of
from cuattn.testing.inputs import Inputs
from cuattn.testing.subject import Operation, Result

on_both_dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
on_both_head_dims = pytest.mark.parametrize("head_dim", [64, 128])
on_both_masks = pytest.mark.parametrize("mask", ["causal", "full"])


def tensors(case: Case) -> list[torch.Tensor]:
    inputs = testing.make_inputs(case)
    return [TorchLibrary().array(x, case.dtype) for x in (inputs.q, inputs.k, inputs.v)]


def halves(case: Case) -> list[np.ndarray]:
    inputs = testing.make_inputs(case)
    return [x.view(np.float16) for x in (inputs.q, inputs.k, inputs.v)]


class TestAccuracy:
    @on_every_backend
    @on_both_head_dims
    @on_both_dtypes
    def test_families(self, attention: Operation, dtype: str, head_dim: int) -> None:
        for case in testing.accuracy_cases("tiny", (dtype,), (head_dim,)):
            testing.assert_accurate(attention, case, TorchLibrary())

    @on_every_backend
    @on_both_head_dims
    @on_both_dtypes
    @on_both_masks
    def test_shapes(self, attention: Operation, dtype: str, head_dim: int, mask: str) -> None:
        """One row, ragged tiles, more rows than keys and fewer; grouped heads."""
        case = Case(1, 1, mask, dtype, head_dim)
        testing.assert_accurate(attention, case, TorchLibrary())
        testing.assert_accurate(attention, replace(case, len_q=799, len_k=3), TorchLibrary())
        testing.assert_accurate(
            attention, replace(case, len_q=113, len_k=203, heads=3, kv_heads=1, batch=2), TorchLibrary()
        )
        testing.assert_accurate(attention, replace(case, len_q=5, len_k=1, heads=4, kv_heads=2), TorchLibrary())

    @pytest.mark.parametrize("attention", backend_params(REFERENCE, SM_80))
    @pytest.mark.parametrize(
        ("dtype", "head_dim", "mask"),
        [("float16", 64, "causal"), ("bfloat16", 128, "causal"), ("bfloat16", 64, "full")],
    )
    def test_a_long_prefill(self, attention: Operation, dtype: str, head_dim: int, mask: str) -> None:
        testing.assert_accurate(attention, Case(1023, 1024, mask, dtype, head_dim), TorchLibrary())

    @on_every_backend
    @on_both_masks
    @pytest.mark.parametrize("len_k", [511, 512, 513, 2047, 2048, 2049, 3073])
    def test_chunk_edges(self, attention: Operation, len_k: int, mask: str) -> None:
        testing.assert_accurate(attention, Case(3, len_k, mask, "bfloat16", family="peaked 8"), TorchLibrary())

    @on_every_backend
    @on_both_masks
    @pytest.mark.parametrize(
        "scale", [0.0, -0.0, -0.125, -2.0, 5e-324, 1e-300, -1e-30, 1e-3, 1.0, 100.0, -100.0, np.float32(0.3), 1]
    )
    def test_scales(self, attention: Operation, scale: float, mask: str) -> None:
        testing.assert_accurate(attention, Case(20, 150, mask, scale=scale), TorchLibrary())

    @on_every_backend
    def test_lse_is_a_natural_logarithm(self, attention: Operation) -> None:
        q, k = np.zeros((1, 1, 2, 64), np.float16), np.zeros((1, 1, 600, 64), np.float16)
        _, lse = attention(q, k, k.copy(), "causal", return_lse=True)
        np.testing.assert_allclose(lse, [[[math.log(599), math.log(600)]]], rtol=1e-7)

    def test_the_reference_is_quick(self) -> None:
        """1 s on two cores is 2 s of processor time, however busy the other core is with other tests."""
        q, k, v = tensors(Case(1024, 1024, "causal", heads=8, kv_heads=8))
        times = []
        for _ in range(3):
            start = time.process_time()
            attention_on(REFERENCE)(q, k, v, "causal")
            times.append(time.process_time() - start)
        assert min(times) < 2


class TestSpecialValues:
    CASE = Case(40, 200, "causal", "bfloat16", heads=2)
    NAN, INFINITY = 0x7FC0, 0x7F80

    def run(self, attention: Operation, case: Case, inputs: Inputs) -> Result:
        return Subject(attention, TorchLibrary(), case).run(inputs)

    @on_every_backend
    @on_both_dtypes
    @on_both_head_dims
    @pytest.mark.parametrize(("len_q", "len_k"), [(5, 2), (70, 3), (200, 150), (3, 0)])
    def test_rows_that_see_nothing(
        self, attention: Operation, dtype: str, head_dim: int, len_q: int, len_k: int
    ) -> None:
        """Positive zero, and an LSE of -inf, in memory that held NaN."""
        q, k, v = tensors(Case(len_q, len_k, "causal", dtype, head_dim, heads=2))
        out = testing.poisoned_empty_like(q)
        _, lse = attention(q, k, v, "causal", scale=-1.0, return_lse=True, out=out)
        blind = len_q - len_k
        assert not raw_bits(out)[0][:, :, :blind].any()
        assert (lse[:, :, :blind] == -torch.inf).all()
        assert len_k == 0 or (raw_bits(out)[0][:, :, blind:] != 0).mean() > 0.9
        assert torch.isfinite(lse[:, :, blind:]).all()

    @on_every_backend
    def test_zeros_are_positive(self, attention: Operation) -> None:
        q, k, v = tensors(Case(17, 30))
        assert not raw_bits(attention(q, k, -torch.zeros_like(v)))[0].any()

    @on_every_backend
    @pytest.mark.parametrize("word", [NAN, INFINITY], ids=["nan", "inf"])
    def test_a_bad_query_stays_in_its_row(self, attention: Operation, word: int) -> None:
        inputs = testing.make_inputs(self.CASE)
        clean = self.run(attention, self.CASE, inputs)
        q = inputs.q.copy()
        q[0, 1, 7, 3] = word
        result = self.run(attention, self.CASE, replace(inputs, q=q))
        assert np.isnan(values_of(result.out, "bfloat16")[0, 1, 7]).all()
        others = np.ones(q.shape[:3], bool)
        others[0, 1, 7] = False
        result[others].assert_equals(clean[others], "other rows")

    @on_every_backend
    @on_both_dtypes
    @pytest.mark.parametrize("first_bad", [12, 100, 161, 165, 199])
    def test_bad_keys_reach_only_the_rows_that_see_them(self, attention: Operation, dtype: str, first_bad: int) -> None:
        """Keys of NaN and infinity of which a causal row sees none change nothing."""
        case = replace(self.CASE, dtype=dtype)
        inputs = testing.make_inputs(case)
        clean = self.run(attention, case, inputs)
        blind = max(0, first_bad - (case.len_k - case.len_q))
        bad = inputs.k.copy()
        bad[:, :, first_bad:] = 0x7FFF
        bad[:, :, first_bad::3] = {"bfloat16": self.INFINITY, "float16": 0x7C00}[dtype]
        result = self.run(attention, case, replace(inputs, k=bad))
        result[:, :, :blind].assert_equals(clean[:, :, :blind], f"rows before {blind}")
        assert np.isnan(values_of(result.out, dtype)[:, :, blind:].astype(np.float32)).all()

    @on_every_backend
    @on_both_dtypes
    @pytest.mark.parametrize("bad", [130, 204])
    def test_bad_values_stay_near(self, attention: Operation, dtype: str, bad: int) -> None:
        """A value of NaN stays in its head, and far enough from the first row that sees a key of its tile."""
        case = Case(200, 205, "causal", dtype, batch=2, heads=2, kv_heads=2)
        inputs = testing.make_inputs(case)
        clean = self.run(attention, case, inputs)
        v = inputs.v.copy()
        v[0, 1, bad] = 0x7FFF
        result = self.run(attention, case, replace(inputs, v=v))
        first = bad // 128 * 128 - (case.len_k - case.len_q)  # row that sees a key of the tile
        near = np.zeros(inputs.q.shape[:3], bool)
        near[0, 1, first // 64 * 64 :] = True  # rows are computed 64 at a time at most
        result[~near].assert_equals(clean[~near], "rows that are far")
        assert np.isnan(values_of(result.out, dtype)[0, 1, bad - 5 :].astype(np.float32)).all()

    @on_every_backend
    @on_both_dtypes
    def test_infinite_values_are_infinite_results(self, attention: Operation, dtype: str) -> None:
        q, k, v = tensors(Case(9, 60, "full", dtype))
        v[0, 0, 11, 5], v[0, 0, 12, 6] = torch.inf, -torch.inf
        out = attention(q, k, v)
        assert (out[0, 0, :, 5] == torch.inf).all()
        assert (out[0, 0, :, 6] == -torch.inf).all()
        out[..., 5:7] = 0
        assert torch.isfinite(out).all()

    @on_every_backend
    @on_both_dtypes
    def test_the_ends_of_the_range(self, attention: Operation, dtype: str) -> None:
        """Values near the largest number, weights far below the smallest."""
        q, k, v = tensors(Case(5, 300, "full", dtype))
        largest = torch.finfo(v.dtype).max
        assert (attention(q, k, torch.full_like(v, largest)) >= largest * 0.99).all()
        smallest = torch.full_like(v, torch.finfo(v.dtype).tiny)
        np.testing.assert_allclose(attention(q, k, smallest).float(), smallest.float()[:, :, :5], rtol=2**-6)


class TestArrays:
    CASE = Case(33, 70, "causal", batch=2, heads=4, kv_heads=2)

    @pytest.fixture
    def bits(self) -> Inputs:
        return testing.make_inputs(self.CASE)

    def test_numpy(self, bits: Inputs) -> None:
        for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
            q, k, v = (x.view(dtype) for x in (bits.q, bits.k, bits.v))
            out, lse = attention_on(REFERENCE)(q, k, v, "causal", return_lse=True)
            assert type(out) is type(lse) is np.ndarray
            assert (out.dtype, out.shape, lse.dtype, lse.shape) == (dtype, q.shape, np.float32, q.shape[:3])
            assert out.flags.c_contiguous
            assert out.flags.writeable

    @on_every_backend
    @on_both_dtypes
    def test_libraries_give_the_same_bits(self, attention: Operation, dtype: str) -> None:
        case = replace(self.CASE, dtype=dtype)
        inputs = testing.make_inputs(case)
        expected = Subject(attention, NumpyLibrary(), case).run(inputs)
        Subject(attention, TorchLibrary(), case).run(inputs).assert_equals(expected, "torch")
        q, k, v = (jnp.asarray(NumpyLibrary().array(x, dtype)) for x in (inputs.q, inputs.k, inputs.v))
        out, lse = attention(q, k, v, "causal", return_lse=True)
        assert isinstance(out, jax.Array)
        assert isinstance(lse, jax.Array)
        assert (out.dtype, lse.dtype) == (jnp.dtype(dtype), jnp.float32)
        Result(raw_bits(out)[0], raw_bits(lse)[0], dtype).assert_equals(expected, "JAX")

    @on_every_backend
    def test_torch_gradients_change_no_bits(self, attention: Operation) -> None:
        q, k, v = tensors(self.CASE)
        expected = attention(q, k, v)
        q.requires_grad_()
        v = torch.nn.Parameter(v)
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded):
                out, lse = attention(q, k, v, return_lse=True)
            assert type(out) is type(lse) is torch.Tensor
            assert out.requires_grad == lse.requires_grad == recorded
            assert_bitwise_equal(out, expected)

    @on_every_backend
    def test_return_types(self, attention: Operation) -> None:
        q, k, v = tensors(self.CASE)
        out = attention(q, k, v)
        assert isinstance(out, torch.Tensor)
        both = attention(q, k, v, return_lse=True)
        assert type(both) is tuple
        assert_bitwise_equal(both[0], out)
        assert_bitwise_equal(attention(q, k, v, None), out)
        assert_bitwise_equal(attention(q, k, v, mask="full", scale=64**-0.5), out)

    @on_every_backend
    @pytest.mark.parametrize("layout", ["bhsd", "bshd"])
    def test_given_output(self, attention: Operation, layout: str) -> None:
        """Whatever its strides and whatever it held, and nothing beside it is touched."""
        arrays = [x if layout == "bhsd" else x.transpose(1, 2) for x in tensors(self.CASE)]
        expected = attention(*arrays, "causal", layout=layout)
        assert tuple(expected.shape) == tuple(arrays[0].shape)
        wide = testing.poisoned_empty_like(torch.zeros(2, 6, 35, 80).half())[:, 1:5, 1:34, 8:72]
        for out in (torch.empty_like(expected), wide if layout == "bhsd" else wide.transpose(1, 2)):
            out.fill_(torch.nan)
            result, _ = attention(*arrays, "causal", layout=layout, out=out, return_lse=True)
            assert result is out
            assert_bitwise_equal(out, expected)
        memory = wide._base
        assert memory is not None
        assert int(torch.isnan(memory).sum()) == memory.numel() - wide.numel()

    @on_every_backend
    def test_strides(self, attention: Operation) -> None:
        """Backwards, repeated, and transposed: read where they are."""
        q, k, v = halves(self.CASE)
        for views in (
            (q[:, :, ::-1], k[:, ::-1], v[::-1]),
            (q, np.broadcast_to(k[:1, :1], k.shape), np.broadcast_to(v[:, :, :1], v.shape)),
            tuple(np.asfortranarray(x.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0) for x in (q, k, v)),
        ):
            assert any(x.base is not None for x in views)
            out, lse = attention(*views, "causal", return_lse=True)
            expected, expected_lse = attention(*map(np.ascontiguousarray, views), "causal", return_lse=True)
            assert_bitwise_equal(out, expected)
            assert_bitwise_equal(lse, expected_lse)

    @on_every_backend
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_strides_beyond_32_bits(self, attention: Operation, axis: int) -> None:
        """Views into memory of more than 2**31 elements of which few pages exist."""
        q, k, v = halves(Case(2, 2, batch=2, heads=2, kv_heads=2))
        far = [_far_apart(x, axis) for x in (q, k, v)]
        assert all(x.strides[axis] > 2**32 for x in far)
        assert_bitwise_equal(attention(*far, "causal"), attention(q, k, v, "causal"))

    @pytest.mark.parametrize("attention", backend_params(REFERENCE, SM_80))
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_output_strides_beyond_32_bits(self, attention: Operation, axis: int) -> None:
        q, k, v = halves(Case(2, 2, batch=2, heads=2, kv_heads=2))
        out = _far_apart(np.full_like(q, np.nan), axis)
        assert attention(q, k, v, out=out) is out
        assert_bitwise_equal(out, attention(q, k, v))


def _far_apart(array: np.ndarray, axis: int) -> np.ndarray:
    """A copy whose elements along one axis are 2**31 + 64 elements apart."""
    step = 2**31 + 64
    strides = [s // array.itemsize for s in array.strides]
    strides[axis] = step
    span = sum((n - 1) * s for n, s in zip(array.shape, strides, strict=True)) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which mmap does not name
    memory = np.frombuffer(mmap.mmap(-1, span * array.itemsize, flags), array.dtype)
    view = np.lib.stride_tricks.as_strided(memory, array.shape, [s * array.itemsize for s in strides])
    view[...] = array
    return view
