"""`cuattn.attention_backward` and `cuattn.attention_varlen_backward`: gradients from what attention returned."""

from typing import Any

import cuattn
from cuattn import calls


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    mask: str | None = "full",
    *,
    scale: float | None = None,
    key_padding_mask: Any = None,
    dlse: Any = None,
    layout: str = "bhsd",
    kv_lengths: Any = None,
) -> tuple[Any, Any, Any]:
    """The gradients of `attention`, from its inputs and results: P is computed again, memory is O(L).

    For torch's autograd, and for JAX's, there is no need to call this: see `attention` and `cuattn.jax.attention`.

    dout: the gradient of out, of its shape and dtype; any strides with a contiguous last dimension and rows that start
        at multiples of 16 bytes.
    q, k, v, mask, scale, key_padding_mask, layout, kv_lengths: as they were given to `attention`.
    out, lse: what it returned with ``return_lse=True``.
    dlse: the gradient of lse, float32, contiguous (B, Hq, Lq); None for 0.

    Returns ``(dq, dk, dv)``, C-contiguous in the shapes and the dtype of q, k and v, in q's library and on its device.
    Gradients at places that hold no key are +0. A row that sees no key, or whose dout and dlse are zeros, contributes
    nothing, whatever its query is, NaN included; its dq is +0. On a GPU the work is queued on the caller's current
    stream without synchronising; the workspace is 32 bytes for each row of each query head, and that of a
    key_padding_mask as in `attention`.

    Guarantee (docs/numerics.md, section 8): under the conditions of `attention`, the bits of a sequence's gradients
    depend on its own inputs alone, those of dk and dv at the rows that contribute, in their order. No atomics, no order
    that the schedule decides.

    Raises ValueError or TypeError for wrong arguments, before anything is launched; others as `attention`.
    """
    if hasattr(q, "requires_grad"):  # as in `attention`
        autograd = cuattn.autograd
        if autograd.is_needed(q, k, v, dout, out, lse, dlse, key_padding_mask, kv_lengths):
            return autograd.attention_backward(
                dout, q, k, v, out, lse, mask, scale, key_padding_mask, dlse, layout, kv_lengths
            )
    return calls.attention_backward(dout, q, k, v, out, lse, dlse, mask, scale, key_padding_mask, layout, kv_lengths)


def attention_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    mask: str | None = "full",
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    dlse: Any = None,
) -> tuple[Any, Any, Any]:
    """The gradients of `attention_varlen`: dout and out (Tq, Hq, Dv), lse and dlse (Hq, Tq).

    The other arguments are those of `attention_varlen` and `attention_backward`, and so are results, guarantee and
    errors: every sequence has the gradients that `attention_backward` gives for it alone.
    """
    if hasattr(q, "requires_grad"):
        autograd = cuattn.autograd
        if autograd.is_needed(q, k, v, dout, out, lse, dlse, cu_seqlens_q, cu_seqlens_k):
            bounds = max_seqlen_q, max_seqlen_k
            return autograd.attention_varlen_backward(
                dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, mask, *bounds, scale, dlse
            )
    return calls.attention_varlen_backward(
        dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, mask, max_seqlen_q, max_seqlen_k, scale
    )
