"""Attention functions of other forms as operations that the checks take."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from cuattn.testing.arrays import bool_array, library_of
from cuattn.testing.subject import Operation


def from_sdpa(function: Callable[..., Any]) -> Operation:
    """A function of the form of ``torch.nn.functional.scaled_dot_product_attention``.

    ``function(q, k, v, is_causal=..., scale=...) -> out`` with q (B, H, Lq, D). Its ``is_causal`` is aligned top-left,
    so causal calls become: ``is_causal=True`` for as many rows as keys; no mask for a single row, which sees every key;
    ``attn_mask``, True where a key is seen, for all else. Fewer key heads than query heads are left to
    ``enable_gqa=True`` if the function has that keyword, and repeated otherwise. A scale is passed on if there is one.
    """
    groups = _has_enable_gqa(function)

    def op(q: Any, k: Any, v: Any, mask: str, *, scale: float | None = None) -> Any:
        options: dict[str, Any] = {} if scale is None else {"scale": scale}
        len_q, len_k = q.shape[2], k.shape[2]
        if mask == "causal" and len_q == len_k:
            options["is_causal"] = True
        elif mask == "causal" and len_q > 1:
            seen = np.tri(len_q, len_k, len_k - len_q, dtype=bool)
            options["attn_mask"] = bool_array(library_of(q), seen)
        group = q.shape[1] // k.shape[1]
        if group > 1 and groups:
            options["enable_gqa"] = True
        elif group > 1:
            k, v = (_repeated(x, group) for x in (k, v))
        return function(q, k, v, **options)

    return op


def _has_enable_gqa(function: Callable[..., Any]) -> bool:
    try:
        return "enable_gqa" in inspect.signature(function).parameters
    except ValueError:  # torch's own is a built-in without a signature that Python can read
        return True


def _repeated(x: Any, group: int) -> Any:
    """Every head of (B, H, L, D) so many times, one behind the other."""
    return x.repeat_interleave(group, 1) if hasattr(x, "repeat_interleave") else x.repeat(group, axis=1)


def from_flash(function: Callable[..., Any]) -> Operation:
    """A function of the form of flash-attn's ``flash_attn_func``.

    ``function(q, k, v, softmax_scale=..., causal=...) -> out`` with q (B, Lq, H, D), fewer key heads than query heads,
    and a causal mask that is aligned bottom-right.
    """

    def op(q: Any, k: Any, v: Any, mask: str, *, scale: float | None = None) -> Any:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return function(q, k, v, softmax_scale=scale, causal=mask == "causal").swapaxes(1, 2)

    return op


def with_autograd(op: Operation) -> Operation:
    """The gradients of an operation on torch tensors, as torch's autograd takes them from its output.

    A gradient operation without dlse, which computes the forward pass again.
    """

    def backward(
        dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, mask: str, *, scale: float | None = None
    ) -> Any:
        import torch

        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(op(*leaves, mask, scale=scale), leaves, dout)

    return backward
