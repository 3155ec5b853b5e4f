"""fp32 arithmetic whose every element is computed alone, in IEEE operations: no BLAS, no SIMD library functions.

A matrix product through BLAS, a NumPy sum or NumPy's exp may round an element differently depending on the shape of the
array or the element's place in it. Elementwise +, * and comparisons do not.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Bits = npt.NDArray[np.unsignedinteger[Any]]
LN2 = np.float32(0.6931471805599453)
LOG2_E = np.float32(1.4426950408889634)

#: 2**f = 1 + f * p(f) on [-1/2, 1/2], highest power first: near-minimax fit, relative error below 1e-7.
_EXP2 = tuple(
    np.float32(x)
    for x in (1.53037035e-05, 0.000154614478, 0.00133334787, 0.00961805694, 0.0555041097, 0.240226507, 0.693147182)
)
#: ln(1 + t) = t - t**2 / 2 + t**3 * p(t) on [-1/3, 1/3]: the kernels' coefficients (kernels_cu/common/logarithm.cuh).
_LOG = tuple(
    np.float32(x)
    for x in (
        0.116374515,
        -0.124468617,
        0.108481616,
        -0.122843958,
        0.142965004,
        -0.166735306,
        0.199998468,
        -0.249999419,
        0.333333343,
    )
)


def exp2(x: Array) -> Array:
    """``2**x`` for x < 128; results below 2**-126 are 0, that of infinity is NaN."""
    whole = np.rint(np.maximum(x, np.float32(-200)))
    fraction = np.maximum(x, np.float32(-200)) - whole
    p = np.full_like(fraction, _EXP2[0])
    for c in _EXP2[1:]:
        np.multiply(p, fraction, out=p)
        np.add(p, c, out=p)
    np.multiply(p, fraction, out=p)
    np.add(p, np.float32(1), out=p)
    exponent = np.nan_to_num(whole, nan=0.0).astype(np.int32)
    # two factors, since 2**128 alone is no fp32 number
    half = exponent >> 1
    for part in (half, exponent - half):
        np.multiply(p, ((part + 127) << 23).view(np.float32), out=p)
    return np.where(x < np.float32(-126), np.float32(0), p)


def natural_log(x: Array) -> Array:
    """``ln(x)`` for positive normal x or 0 (-inf); infinity and NaN come back as they are."""
    bits = x.view(np.int32)
    exponent = (bits - np.int32(0x3F2AAAAB)) >> 23
    t = (bits - (exponent << 23)).view(np.float32) - np.float32(1)
    p = np.full_like(t, _LOG[0])
    for c in _LOG[1:]:
        p = p * t + c
    square = t * t
    e = exponent.astype(np.float32)
    tail = e * np.float32(-2.12194440e-4) + (square * t * p - square * np.float32(0.5))
    finite = e * np.float32(0.693359375) + (t + tail)
    return np.where(x == 0, np.float32(-np.inf), np.where(x < np.float32(np.inf), finite, x))


def matmul(a: Array, b: Array) -> Array:
    """``a (..., M, K) @ b (..., K, N)``, each element summed over K ascending, a rounding after every operation."""
    out = a[..., :, 0, None] * b[..., None, 0, :]
    add_matmul(out, a[..., 1:], b[..., 1:, :])
    return out


def add_matmul(out: Array, a: Array, b: Array) -> None:
    """``out += a (..., M, K) @ b (..., K, N)`` in place: the sum goes on over K ascending."""
    product = np.empty_like(out)
    for k in range(a.shape[-1]):
        np.multiply(a[..., :, k, None], b[..., None, k, :], out=product)
        np.add(out, product, out=out)


def row_sum(x: Array) -> Array:
    """Sum over the last axis, whose length is a power of two, by halves: element j and element j + n / 2 first."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def widen(bits: Bits, dtype: str) -> Array:
    """Raw bits of float16, bfloat16 or float32 as fp32 numbers."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(dtype).astype(np.float32, copy=False)


def narrow(x: Array, dtype: str) -> Bits:
    """fp32 numbers rounded to nearest even, as raw bits; NaN becomes 0x7fff, of float32 0x7fffffff."""
    bits: Bits
    if dtype == "bfloat16":
        wide = x.view(np.uint32)
        rounded = wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))
        bits = (rounded >> np.uint32(16)).astype(np.uint16)
    else:
        bits = x.astype(dtype).view(np.uint16 if dtype == "float16" else np.uint32)
    return np.where(np.isnan(x), bits.dtype.type(np.iinfo(bits.dtype).max >> 1), bits)
