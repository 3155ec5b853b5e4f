"""The reference's fp32 arithmetic: accurate, and the same for an element wherever it stands."""

import ml_dtypes
import numpy as np
import pytest
import torch

from cuattn.reference.arithmetic import exp2, matmul, narrow, natural_log, row_sum, widen

RANDOM = np.random.Generator(np.random.Philox(key=1))


def every_kind_of_float() -> np.ndarray:
    """Random bit patterns: all exponents, both signs, subnormals, infinities and NaN; and the corner cases."""
    words = RANDOM.integers(0, 2**32, 200_000, np.uint32)
    corners = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 3.4e38, 1e-45, 5.96e-8, 2.98e-8])
    return np.concatenate([words.view(np.float32), corners.astype(np.float32)])


def in_ulp(actual: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.abs(actual - exact) / np.spacing(np.abs(exact).astype(np.float32))


class TestExp2:
    def test_error(self) -> None:
        x = np.concatenate([RANDOM.uniform(-126, 0, 300_000), RANDOM.uniform(-2, 128, 100_000), [-126, -0.5, 0.5]])
        x = x.astype(np.float32)
        assert in_ulp(exp2(x), np.exp2(x.astype(np.float64))).max() < 2

    def test_powers_of_two_are_exact(self) -> None:
        x = np.arange(-126, 128, dtype=np.float32)
        np.testing.assert_array_equal(exp2(x), np.ldexp(np.float32(1), x.astype(int)))
        assert exp2(np.float32([-0.0]))[0] == 1

    def test_ends_of_the_range(self) -> None:
        largest = np.nextafter(np.float32(128), np.float32(0))
        assert np.isfinite(exp2(np.array([largest])))
        flushed = exp2(np.float32([-126.00001, -126.4, -126.6, -127, -150, -1e4, -3.4e38, -np.inf]))
        assert not flushed.view(np.uint32).any()

    def test_nan_and_infinity(self) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            assert np.isnan(exp2(np.float32([np.nan, np.inf]))).all()


class TestNaturalLog:
    def test_error(self) -> None:
        x = np.concatenate([np.exp(RANDOM.uniform(-87, 88, 300_000)), RANDOM.uniform(0.5, 2, 100_000)])
        x = x.astype(np.float32)
        exact = np.log(x.astype(np.float64))
        assert (
            np.abs(natural_log(x) - exact) / np.spacing(np.maximum(np.abs(exact), 0.25).astype(np.float32))
        ).max() < 2

    def test_special_values(self) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            got = natural_log(np.float32([1, np.inf, np.nan]))
        assert (got[0], got[1]) == (0, np.inf)
        assert np.isnan(got[2])


class TestSums:
    def test_product_equals_float64(self) -> None:
        a, b = (RANDOM.standard_normal((2, 33, 48), np.float32) for _ in range(2))
        exact = a.astype(np.float64) @ b.swapaxes(1, 2).astype(np.float64)
        np.testing.assert_allclose(matmul(a, b.swapaxes(1, 2)), exact, rtol=0, atol=1e-5)

    def test_product_is_a_sum_in_order(self) -> None:
        a, b = RANDOM.standard_normal(64, np.float32), RANDOM.standard_normal(64, np.float32)
        total = a[0] * b[0]
        for x, y in zip(a[1:], b[1:], strict=True):
            total = total + x * y
        assert matmul(a[None], b[:, None])[0, 0].tobytes() == total.tobytes()

    @pytest.mark.parametrize("contiguous", [True, False])
    def test_product_does_not_see_its_surroundings(self, contiguous: bool) -> None:
        """Element by element the same, in any slice of rows and columns, at any alignment."""
        a, b = RANDOM.standard_normal((70, 64), np.float32), RANDOM.standard_normal((64, 130), np.float32)
        whole = matmul(a, b)
        for rows, columns in ((slice(0, 1), slice(None)), (slice(3, 20), slice(1, 8)), (slice(None), slice(129, 130))):
            left, right = a[rows], b[:, columns]
            part = matmul(left.copy(), right.copy()) if contiguous else matmul(left, right)
            assert part.tobytes() == whole[rows, columns].tobytes()

    def test_row_sum(self) -> None:
        x = RANDOM.standard_normal((9, 128), np.float32)
        np.testing.assert_allclose(row_sum(x), x.astype(np.float64).sum(axis=1), atol=1e-5)
        assert row_sum(x[4:5]).tobytes() == row_sum(x)[4:5].tobytes()
        padded = np.concatenate([x, np.zeros_like(x)], axis=1)
        np.testing.assert_array_equal(row_sum(x[:, :1]), x[:, 0])
        np.testing.assert_array_equal(row_sum(padded), row_sum(x))


class TestConversions:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_narrow_equals_torch(self, dtype: str) -> None:
        values = every_kind_of_float()
        with np.errstate(over="ignore", invalid="ignore"):
            bits = narrow(values, dtype)
        expected = torch.from_numpy(values).to(getattr(torch, dtype)).view(torch.int16).numpy().view(np.uint16)
        nan = np.isnan(values)
        np.testing.assert_array_equal(bits[~nan], expected[~nan])
        assert nan.any()
        assert (bits[nan] == 0x7FFF).all()

    def test_float32_is_itself(self) -> None:
        values = every_kind_of_float()
        words, nan = values.view(np.uint32), np.isnan(values)
        assert nan.any()
        assert (narrow(values, "float32") == np.where(nan, 0x7FFFFFFF, words)).all()
        assert widen(words, "float32").tobytes() == words.tobytes()

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_widen_is_exact(self, dtype: str) -> None:
        bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
        expected = bits.view(np.float16 if dtype == "float16" else ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(widen(bits, dtype), expected)
        numbers = ~np.isnan(expected)
        np.testing.assert_array_equal(narrow(widen(bits, dtype), dtype)[numbers], bits[numbers])
