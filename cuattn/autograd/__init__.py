"""Attention as operators of torch: what autograd, torch.compile, torch.func and autocast need to know of it.

These modules import torch when they are loaded; the public functions load them when they are given a tensor. Only calls
in which torch has to see the operator come here, the others compute at once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cuattn.autograd import operators
from cuattn.checks import check_layout, check_mask, check_optional_count, check_scale

Gradients = tuple[Any, Any, Any]


def cast(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """The inputs as torch.autocast wants them: in its dtype, all but float64, as for torch's own attention."""
    if not torch._C._is_any_autocast_enabled():  # which is asked in half the time
        return q, k, v
    kind = "cuda" if q.is_cuda else "cpu"
    if not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)

    def one(x: Any) -> Any:
        eligible = isinstance(x, Tensor) and x.device.type == kind and x.is_floating_point()
        return x.to(dtype) if eligible and x.dtype != torch.float64 else x

    return one(q), one(k), one(v)


def is_needed(*arrays: Any) -> bool:
    """Whether torch has to see the operator: it records gradients, compiles, transforms or fakes.

    False if an array is neither a tensor nor None: what computes at once refuses it.
    """
    requires_grad = False
    for x in arrays:
        if x is None:
            continue
        if not isinstance(x, Tensor):
            return False
        requires_grad = requires_grad or x.requires_grad
    return (
        torch.compiler.is_compiling()
        or (requires_grad and torch.is_grad_enabled())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or not operators.are_plain(arrays)
    )


def attention(
    q: Any,
    k: Any,
    v: Any,
    mask: str | None,
    scale: float | None,
    key_padding_mask: Any,
    return_lse: bool,
    layout: str,
    out: Any,
    num_splits: int | None,
    kv_lengths: Any,
) -> Any:
    """`cuattn.attention` by its operator."""
    check_layout(layout)
    options = _checked(mask, scale)
    check_optional_count("num_splits", num_splits, 1)
    _check_inputs("cuattn.attention", out, q, k, v)
    results = operators.ATTENTION(q, k, v, key_padding_mask, kv_lengths, *options, layout, num_splits)
    return _handed_back(results, out, return_lse)


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    mask: str | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scale: float | None,
    return_lse: bool,
    out: Any,
    num_splits: int | None,
) -> Any:
    """`cuattn.attention_varlen` by its operator."""
    options = _checked(mask, scale)
    _check_bounds(max_seqlen_q, max_seqlen_k)
    check_optional_count("num_splits", num_splits, 1)
    _check_inputs("cuattn.attention_varlen", out, q, k, v)
    results = operators.VARLEN(q, k, v, cu_seqlens_q, cu_seqlens_k, *options, num_splits)
    return _handed_back(results, out, return_lse)


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    mask: str | None,
    scale: float | None,
    key_padding_mask: Any,
    dlse: Any,
    layout: str,
    kv_lengths: Any,
) -> Gradients:
    """`cuattn.attention_backward` by its operator."""
    check_layout(layout)
    _check_inputs("cuattn.attention_backward", None, q, k, v, dout, out, lse)
    options = _checked(mask, scale)
    arrays = dout, q, k, v, out, lse, dlse, key_padding_mask, kv_lengths
    dq, dk, dv = operators.ATTENTION_BACKWARD(*arrays, *options, layout)
    return dq, dk, dv


def attention_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    mask: str | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scale: float | None,
    dlse: Any,
) -> Gradients:
    """`cuattn.attention_varlen_backward` by its operator."""
    _check_bounds(max_seqlen_q, max_seqlen_k)
    _check_inputs("cuattn.attention_varlen_backward", None, q, k, v, dout, out, lse)
    options = _checked(mask, scale)
    arrays = dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k
    dq, dk, dv = operators.VARLEN_BACKWARD(*arrays, *options)
    return dq, dk, dv


def _checked(mask: str | None, scale: float | None) -> tuple[str, float | None]:
    """What an operator's schema would refuse in its own words."""
    if torch.compiler.is_compiling() and isinstance(scale, (int, float)):
        return check_mask(mask), scale  # which may be a symbol here, and is checked where it is a number
    return check_mask(mask), None if scale is None else check_scale(scale, 1)


def _check_bounds(max_seqlen_q: Any, max_seqlen_k: Any) -> None:
    if not torch.compiler.is_compiling():  # where they may be numbers that only the device knows
        check_optional_count("max_seqlen_q", max_seqlen_q, 0)
        check_optional_count("max_seqlen_k", max_seqlen_k, 0)


def _check_inputs(function: str, out: Any, *inputs: Any) -> None:
    for name, x in zip("qkv", inputs, strict=False):
        if x.is_nested:
            raise TypeError(f"{name}: got a nested tensor, expected a strided torch tensor in CPU or CUDA memory")
        if out is not None and torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"out: got a tensor beside {name}, which requires grad, expected None or torch.no_grad()")
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        operators.refuse_forward_mode(function)


def _handed_back(results: tuple[Any, Any], out: Any, return_lse: bool) -> Any:
    made, lse = results
    if out is not None:
        if not isinstance(out, Tensor):
            raise TypeError(f"out: got {type(out).__name__}, expected an array of q's library")
        if out.shape != made.shape or out.dtype != made.dtype or out.device != made.device:
            got, expected = ((tuple(x.shape), x.dtype, str(x.device)) for x in (out, made))
            raise ValueError(f"out: got shape, dtype and device {got}, expected {expected}")
        made = out.copy_(made)
    return (made, lse) if return_lse else made
