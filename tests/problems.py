"""Problems of raw bits in the kernel's axes, and what the CPU reference makes of them."""

from typing import Any

import numpy as np
import pytest

from cuattn import reference
from cuattn.interop import Tensor, import_tensor
from cuattn.interop.numpy_ import numpy_dtype
from cuattn.problem import Problem
from cuattn.testing.arrays import Bits, poison, round_to_bits
from cuattn.testing.bitwise import BitwiseMismatch, assert_same_bits

Both = tuple[Bits, Bits]
#: Unsigned integers of an element's size.
WORD = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32}
both_masks = pytest.mark.parametrize("mask", ["full", "causal"])
every_dtype = pytest.mark.parametrize("dtype", sorted(WORD))


def normal(shape: tuple[int, ...], dtype: str = "float16", seed: int = 0) -> Bits:
    random = np.random.Generator(np.random.Philox(key=seed))
    return round_to_bits(random.standard_normal(shape, np.float32), dtype)


def qkv(
    batch: int, len_q: int, len_k: int, dtype: str = "float16", head_dim: int = 16, value_dim: int = 24
) -> list[Bits]:
    """q (batch, 4, len_q, head_dim), k and v (batch, 2, len_k, ...)."""
    shapes = (4, len_q, head_dim), (2, len_k, head_dim), (2, len_k, value_dim)
    return [normal((batch, *shape), dtype, seed) for seed, shape in enumerate(shapes)]


def tensor(bits: Bits, dtype: str) -> Tensor:
    return import_tensor(bits.view(numpy_dtype(dtype)), "bits")


def int32(numbers: Any) -> Tensor:
    return import_tensor(np.array(numbers, np.int32), "numbers")


def attend(q: Bits, k: Bits, v: Bits, mask: str = "causal", dtype: str = "float16", **options: Any) -> Both:
    """Bits of the output and of the LSE; q, k, v have the kernel's axes."""
    tensors = (tensor(x, dtype) for x in (q, k, v))
    problem = Problem(*tensors, mask, options.pop("scale", 0.25), options.pop("layout", "bhsd"), **options)
    out, lse = poison((*q.shape[:3], v.shape[3]), q.itemsize), poison(problem.lse_shape, 4)
    reference.forward(problem, tensor(out, dtype), tensor(lse, "float32"))
    return out, lse.reshape(q.shape[:3])


def assert_both_same(actual: Both, expected: Both, dtype: str = "float16") -> None:
    assert_same_bits(actual[0], expected[0], dtype, "out")
    assert_same_bits(actual[1], expected[1], "float32", "LSE")


def assert_both_differ(actual: Both, expected: Both) -> None:
    for one, other in zip(actual, expected, strict=True):
        with pytest.raises(BitwiseMismatch):
            assert_same_bits(one, other, f"uint{8 * one.itemsize}")
