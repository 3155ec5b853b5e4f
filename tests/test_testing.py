"""`cuattn.testing`, what is examined: comparisons of bits, arrays, inputs and accuracy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from stand_ins import row_by_row

from cuattn import testing
from cuattn.testing import BitwiseMismatch, Case, Library, NumpyLibrary, TorchLibrary, assert_bitwise_equal
from cuattn.testing.arrays import is_contiguous, poison, raw_bits, round_to_bits, values_of
from cuattn.testing.bitwise import assert_same_bits
from cuattn.testing.subject import Placement, contiguous, padded, rows_first


class TestBitwise:
    def test_equal_bytes_pass_across_libraries(self) -> None:
        values = np.array([[1.5, -0.0, np.nan]], np.float16)
        assert_bitwise_equal(values, torch.from_numpy(values.copy()))
        assert_bitwise_equal(jnp.asarray(values), values)
        assert_bitwise_equal(torch.tensor([1.0], dtype=torch.bfloat16), np.array([1.0], ml_dtypes.bfloat16))
        assert_bitwise_equal(np.float32(2), torch.tensor(2.0))
        assert_bitwise_equal(np.empty((0, 3)), np.empty((0, 3)))
        assert_bitwise_equal(torch.ones(3, requires_grad=True), np.ones(3, np.float32))

    def test_strides_do_not_count(self) -> None:
        values = np.arange(24, dtype=np.float32).reshape(4, 6)
        assert_bitwise_equal(values.T, np.ascontiguousarray(values.T))
        assert_bitwise_equal(torch.from_numpy(values)[:, ::2], values[:, ::2])

    def test_zeros_of_other_sign_differ(self) -> None:
        with pytest.raises(BitwiseMismatch, match=r"got -0\.0 \(0x8000\), expected 0\.0 \(0x0000\)"):
            assert_bitwise_equal(np.float16([-0.0]), np.float16([0.0]))

    def test_nans_of_other_payload_differ(self) -> None:
        actual, expected = (np.array([word], np.uint32).view(np.float32) for word in (0x7FC00001, 0x7FC00000))
        with pytest.raises(BitwiseMismatch, match=r"nan \(0x7fc00001\), expected nan \(0x7fc00000\)"):
            assert_bitwise_equal(actual, expected)

    def test_message_counts_and_shows_the_first(self) -> None:
        expected = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
        actual = expected.clone()
        actual[1, 0, 2], actual[1, 2, 3] = 1.0, -3.0
        with pytest.raises(BitwiseMismatch) as caught:
            assert_bitwise_equal(actual, expected, "out")
        assert str(caught.value) == (
            "out: 2 of 24 elements differ, first at (1, 0, 2): got 1.0 (0x3f80), expected 0.0 (0x0000)"
        )

    def test_a_type_that_numpy_cannot_name_is_shown_as_words(self) -> None:
        with pytest.raises(BitwiseMismatch, match=r"got 0x40, expected 0x38$"):
            assert_same_bits(np.uint8([0x40]), np.uint8([0x38]), "float8_of_tomorrow")

    @pytest.mark.parametrize(
        ("actual", "message"),
        [
            (np.zeros((2, 1), np.float16), r"out: got shape \(2, 1\), expected \(1, 2\)"),
            (np.zeros((1, 2), np.int16), "out: got dtype int16, expected float16"),
        ],
    )
    def test_other_shape_or_dtype_is_no_mismatch_of_bits(self, actual: Any, message: str) -> None:
        with pytest.raises(AssertionError, match=message) as caught:
            assert_bitwise_equal(actual, np.zeros((1, 2), np.float16), "out")
        assert not isinstance(caught.value, BitwiseMismatch)

    @pytest.mark.parametrize("array", [np.zeros(2, np.complex128), torch.zeros(2, dtype=torch.complex128)])
    def test_wide_elements_are_refused(self, array: Any) -> None:
        with pytest.raises(TypeError, match="complex128"):
            raw_bits(array)


class TestArrays:
    def test_bfloat16_rounds_as_others_do(self) -> None:
        random = np.random.default_rng(0)
        values = random.integers(0, 2**32, 100_000, np.uint32).view(np.float32)
        ties = (random.integers(0, 2**16, 1000, np.uint32) << 16 | 0x8000).view(np.float32)
        values = np.concatenate([values, ties, np.float32([0, -0.0, np.inf, -np.inf, 3.4e38])])
        numbers = values[~np.isnan(values)]
        expected = torch.from_numpy(numbers).to(torch.bfloat16)
        assert_bitwise_equal(
            torch.from_numpy(round_to_bits(numbers, "bfloat16").view(np.int16)).view(torch.bfloat16), expected
        )
        np.testing.assert_array_equal(
            round_to_bits(numbers, "bfloat16"), numbers.astype(ml_dtypes.bfloat16).view(np.uint16)
        )

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_bits_and_values_are_inverse(self, dtype: str) -> None:
        values = np.float32([0.0, -0.0, 1.5, -3.0, np.inf, np.nan])
        bits = round_to_bits(values, dtype)
        assert_bitwise_equal(round_to_bits(values_of(bits, dtype).astype(np.float32), dtype), bits)
        np.testing.assert_array_equal(values_of(bits, dtype).astype(np.float32), values)
        assert np.isnan(values_of(poison((3,), bits.itemsize), dtype)).all()

    @pytest.mark.parametrize("library", [NumpyLibrary(), TorchLibrary()], ids=lambda library: library.name)
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("place", [contiguous, padded, rows_first])
    def test_placements_hold_the_same_bits(self, library: Library, dtype: str, place: Placement) -> None:
        bits = testing.make_inputs(Case(5, 7, dtype=dtype, batch=2, heads=3)).q
        array = place(library, bits, dtype)
        np.testing.assert_array_equal(raw_bits(array)[0], bits)
        assert raw_bits(array)[1] == dtype
        strides = array.stride() if library.name == "torch" else [s // bits.itemsize for s in array.strides]
        assert strides[-1] == 1
        assert all(stride * bits.itemsize % 16 == 0 for stride in strides[:-1])
        assert is_contiguous(array) == (place is contiguous)

    @pytest.mark.parametrize(
        "like", [np.zeros((2, 3), ml_dtypes.bfloat16), torch.zeros(3, 2).T, np.zeros(0, np.float16)]
    )
    def test_poisoned_empty_like(self, like: Any) -> None:
        poisoned = testing.poisoned_empty_like(like)
        bits, dtype = raw_bits(poisoned)
        assert (type(poisoned), dtype, poisoned.shape) == (type(like), raw_bits(like)[1], like.shape)
        assert np.isnan(values_of(bits, dtype)).all()

    def test_poisoned_empty_like_names_what_it_got(self) -> None:
        with pytest.raises(TypeError, match="got list, expected an array of NumPy, torch or CuPy"):
            testing.poisoned_empty_like([1.0])


class TestInputs:
    def test_inputs_are_the_same_everywhere_and_always(self) -> None:
        inputs = testing.make_inputs(Case(2, 3, dtype="bfloat16"))
        assert [int(x[0, 0, 0, 0]) for x in (inputs.q, inputs.k, inputs.v)] == [0x3D75, 0xBF69, 0xBEDE]

    def test_seeds_and_shapes(self) -> None:
        case = Case(5, 7, batch=2, heads=4, kv_heads=2)
        inputs = testing.make_inputs(case)
        assert (inputs.q.shape, inputs.k.shape, inputs.v.shape) == ((2, 4, 5, 64), (2, 2, 7, 64), (2, 2, 7, 64))
        assert (testing.make_inputs(replace(case, seed=1)).q != inputs.q).mean() > 0.9
        other = testing.make_inputs(replace(case, value_dim=24))
        assert (other.k.shape, other.v.shape) == ((2, 2, 7, 64), (2, 2, 7, 24))

    @pytest.mark.parametrize(
        ("family", "query_std", "value_mean"),
        [("normal", 1, 0), ("peaked 8", 8, 0), ("peaked 16", 16, 0), ("large mean", 1, 30), ("long context", 1, 0)],
    )
    def test_families(self, family: str, query_std: float, value_mean: float) -> None:
        assert family in testing.FAMILIES
        inputs = testing.make_inputs(Case(200, 200, family=family))
        q, v = values_of(inputs.q, "float16"), values_of(inputs.v, "float16")
        assert q.std(dtype=np.float64) == pytest.approx(query_std, rel=0.05)
        assert v.mean(dtype=np.float64) == pytest.approx(value_mean, abs=0.05)

    def test_unknown_family(self) -> None:
        with pytest.raises(ValueError, match="family: got 'odd', expected one of 'normal'"):
            testing.make_inputs(Case(1, 1, family="odd"))


class TestAccuracy:
    @pytest.mark.parametrize("case", list(testing.accuracy_cases("tiny", head_dims=(64, (24, 40)))), ids=str)
    def test_a_good_operation_passes(self, case: Case) -> None:
        if (case.dtype, case.family) == ("float32", "long context"):
            with pytest.raises(AssertionError, match="an element's error"):  # one running sum over 2200 keys
                testing.assert_accurate(row_by_row, case)
        else:
            testing.assert_accurate(row_by_row, case)

    def test_rows_that_see_nothing(self) -> None:
        testing.assert_accurate(row_by_row, Case(9, 3))

    def test_the_bar_of_float32(self) -> None:
        case = Case(66, 64, "full", "float32")
        testing.assert_accurate(row_by_row, case)
        for factor, broken in ((1 + 1e-6, 1), (1 + 4e-6, 2)):
            (result,) = testing.measure_accuracy(
                self._spoilt(lambda out, lse, factor=factor: np.multiply(out, np.float32(factor), out=out)), [case]
            )
            assert sum("relative L2" in failure for failure in result.failures) == broken

    @staticmethod
    def _spoilt(spoil: Callable[[Any, Any], object]) -> Any:
        def op(q: Any, k: Any, v: Any, mask: str, **options: Any) -> Any:
            out, lse = row_by_row(q, k, v, mask, **options)
            spoil(out, lse)
            return out, lse

        return op

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda out, lse: np.multiply(out, 1.002, out=out), "relative L2 error"),
            (lambda out, lse: out.__setitem__((0, 0, 5, 7), out[0, 0, 5, 7] + np.float16(0.01)), "an element's error"),
            (lambda out, lse: out.__setitem__((0, 0, 5, 7), np.nan), "relative L2 error nan"),
            (lambda out, lse: np.add(lse, 1e-4, out=lse), "LSE error"),
            (lambda out, lse: lse.__setitem__((0, 0, 8), np.nan), "LSE error nan"),
            (lambda out, lse: out.__setitem__((0, 0, 0), -0.0), "a row that sees no key"),
            (lambda out, lse: lse.__setitem__((0, 0, 0), -100), "a row that sees no key"),
        ],
    )
    def test_each_rule_can_be_broken(self, spoil: Callable[[Any, Any], object], message: str) -> None:
        case = Case(66, 64)  # the first two rows see nothing
        with pytest.raises(AssertionError, match=message):
            testing.assert_accurate(self._spoilt(spoil), case)

    def test_wrong_masks_and_scales_are_found(self) -> None:
        with pytest.raises(AssertionError, match="relative L2"):
            testing.assert_accurate(lambda q, k, v, mask, **o: row_by_row(q, k, v, "full", **o), Case(20, 30))
        with pytest.raises(AssertionError, match="relative L2"):
            testing.assert_accurate(lambda q, k, v, mask, **o: row_by_row(q, k, v, mask), Case(20, 30, scale=0.5))

    def test_an_exception_is_a_failed_case(self) -> None:
        def broken(*args: Any, **options: Any) -> Any:
            raise RuntimeError("no")

        (result,) = testing.measure_accuracy(broken, [Case(2, 2)])
        assert result.failures == ("RuntimeError: no",)
