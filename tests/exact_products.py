"""A tensor core's products in rational arithmetic, element by element: the model that the emulator must equal."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint32]
#: a (n, 16, 16) and b (n, 8, 16) in a 16-bit type, or (n, 16, 8) and (n, 8, 8) in TF32, the upper 19 of 32 bits; c
#: (n, 16, 8) in fp32; all as bits.
Operands = tuple[npt.NDArray[np.unsignedinteger[Any]], npt.NDArray[np.unsignedinteger[Any]], Bits]


def values(bits: npt.NDArray[np.generic], dtype: str) -> npt.NDArray[np.float64]:
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "tf32":
        return (bits.astype(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)
    return bits.view(dtype).astype(np.float64)


def truncated(value: Fraction) -> float:
    """Rounded toward zero to fp32, to infinity from 2^128 on."""
    magnitude = abs(value)
    if magnitude >= 2**128:
        return math.copysign(math.inf, value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    return float(math.trunc(value / unit) * unit)


def exponent_of(x: float, smallest: int) -> int:
    """Of the leading bit, or of a subnormal number the smallest of its format."""
    return max(math.frexp(x)[1] - 1, smallest)


def exact_step(a: list[float], b: list[float], c: float, fraction_bits: int, smallest: int) -> float:
    """c + sum of a * b, each term truncated to a multiple of the largest exponent's unit, the sum truncated to fp32."""
    if math.isinf(c):
        return c
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x and y]
    exponents = [exponent_of(x, smallest) + exponent_of(y, smallest) for x, y in pairs]
    exponents += [exponent_of(c, -126)] if c else []
    if not exponents:
        return 0.0
    unit = Fraction(2) ** (max(exponents) - fraction_bits)
    terms = [Fraction(c), *(Fraction(x) * Fraction(y) for x, y in pairs)]
    return truncated(sum(math.trunc(term / unit) for term in terms) * unit)


def exact_products(dtype: str, operands: Operands, terms: int, fraction_bits: int) -> Bits:
    """Rational arithmetic, element by element, for finite operands; ``terms`` of a step, of TF32 half as many."""
    smallest = -14 if dtype == "float16" else -126
    columns = operands[0].shape[-1]
    terms = terms * columns // 16
    a, b = (values(x, dtype).tolist() for x in operands[:2])
    d = operands[2].view(np.float32).astype(np.float64).copy()
    for i, m, n in np.ndindex(*d.shape):
        for k in range(0, columns, terms):
            step = slice(k, k + terms)
            d[i, m, n] = exact_step(a[i][m][step], b[i][n][step], d[i, m, n], fraction_bits, smallest)
    return d.astype(np.float32).view(np.uint32)
