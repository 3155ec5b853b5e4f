"""What the tests of gradients share: inputs that require them, and the gradients that they should get."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cuattn
from cuattn.testing import assert_bitwise_equal

Tensors = tuple[Tensor, ...]
both_masks = ("full", "causal")
causal = functools.partial(cuattn.attention, mask="causal")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    numbers = np.random.Generator(np.random.Philox(key=seed)).standard_normal(shape, np.float32)
    return torch.from_numpy(numbers).to(device, dtype)


def inputs(
    batch: int = 2, len_q: int = 5, len_k: int = 7, layout: str = "bhsd", head_dim: int = 16, **options: Any
) -> Tensors:
    """q of 4 heads, k and v of 2 heads, values of another head dim; leaves that require gradients."""
    shapes = (4, len_q, head_dim), (2, len_k, head_dim), (2, len_k, head_dim + 8)
    if layout == "bshd":
        shapes = tuple((length, heads, columns) for heads, length, columns in shapes)
    return tuple(normal(batch, *shape, seed=i, **options).requires_grad_() for i, shape in enumerate(shapes))


def packed(lengths: Sequence[tuple[int, int]] = ((3, 6), (0, 2), (5, 5)), **options: Any) -> tuple[Tensors, Tensors]:
    """Inputs of sequences with so many queries and keys, and the cumulative lengths of both."""
    starts = tuple(np.cumsum([0, *numbers], dtype=np.int32) for numbers in zip(*lengths, strict=True))
    shapes = (starts[0][-1], 4, 16), (starts[1][-1], 2, 16), (starts[1][-1], 2, 24)
    qkv = tuple(normal(*shape, seed=i, **options).requires_grad_() for i, shape in enumerate(shapes))
    return qkv, tuple(torch.from_numpy(numbers).to(qkv[0].device) for numbers in starts)


def upstream(*results: Tensor) -> Tensors:
    """Gradients of results."""
    return tuple(normal(*x.shape, dtype=x.dtype, seed=10 + i, device=str(x.device)) for i, x in enumerate(results))


def gradients(results: Sequence[Tensor] | Tensor, leaves: Tensors, given: Sequence[Tensor] | Tensor) -> Tensors:
    return torch.autograd.grad(results, leaves, given)


@torch.no_grad()
def expected(qkv: Tensors, mask: str, dout: Tensor, dlse: Tensor | None = None, **options: Any) -> Tensors:
    """By `cuattn.attention_backward`."""
    results = cuattn.attention(*qkv, mask, return_lse=True, **options)
    return cuattn.attention_backward(dout, *qkv, *results, mask, dlse=dlse, **options)


@torch.no_grad()
def expected_packed(qkv: Tensors, starts: Tensors, mask: str, dout: Tensor, dlse: Tensor | None = None) -> Tensors:
    results = cuattn.attention_varlen(*qkv, *starts, mask, return_lse=True)
    return cuattn.attention_varlen_backward(dout, *qkv, *results, *starts, mask, dlse=dlse)


def assert_all_equal(actual: Sequence[Any], wanted: Sequence[Any], name: str = "") -> None:
    for i, (got, want) in enumerate(zip(actual, wanted, strict=True)):
        assert_bitwise_equal(got, want, f"{name} {i}")


def both(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = causal(q, k, v, return_lse=True, **options)
    return out, lse


def assert_trains(function: Callable[..., Any], qkv: Tensors, **options: Any) -> None:
    """``function`` of q, k, v gives the output and the LSE, with their gradients."""
    results = function(*qkv)
    with torch.no_grad():
        assert_all_equal(results, both(*qkv, **options))
    given = upstream(*results)
    assert_all_equal(gradients(results, qkv, given), expected(qkv, "causal", *given, **options))
