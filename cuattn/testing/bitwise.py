"""Equality of raw bytes: -0 is not +0, and two NaN are equal only with the same payload."""

from typing import Any

import numpy as np

from cuattn.testing.arrays import Bits, raw_bits, values_of


class BitwiseMismatch(AssertionError):
    """Two arrays of one shape and dtype differ in some element."""


def assert_bitwise_equal(actual: Any, expected: Any, name: str = "") -> None:
    """Assert that two arrays (NumPy, torch on any device, CuPy, JAX) have the same shape, dtype and raw bytes.

    They need not be of one library. Raises AssertionError for another shape or dtype and its subclass BitwiseMismatch
    for other bytes; that message counts the differing elements and shows the first with its coordinate, both values
    and both raw words.
    """
    actual_bits, actual_dtype = raw_bits(actual)
    expected_bits, expected_dtype = raw_bits(expected)
    label = f"{name}: " if name else ""
    if actual_dtype != expected_dtype:
        raise AssertionError(f"{label}got dtype {actual_dtype}, expected {expected_dtype}")
    assert_same_bits(actual_bits, expected_bits, actual_dtype, name)


def assert_same_bits(actual: Bits, expected: Bits, dtype: str, name: str = "") -> None:
    """`assert_bitwise_equal` for raw bits of ``dtype`` on the host."""
    label = f"{name}: " if name else ""
    if actual.shape != expected.shape:
        raise AssertionError(f"{label}got shape {actual.shape}, expected {expected.shape}")
    differs = actual != expected
    count = np.count_nonzero(differs)
    if count == 0:
        return
    first = tuple(int(i) for i in np.unravel_index(int(np.argmax(differs)), actual.shape))
    raise BitwiseMismatch(
        f"{label}{count} of {actual.size} elements differ, first at {first}: "
        f"got {_show(actual[first], dtype)}, expected {_show(expected[first], dtype)}"
    )


def _show(word: Any, dtype: str) -> str:
    raw = f"0x{int(word):0{2 * word.itemsize}x}"
    try:
        return f"{values_of(np.array([word]), dtype)[0].item()!r} ({raw})"
    except TypeError:  # a type of another library
        return raw
