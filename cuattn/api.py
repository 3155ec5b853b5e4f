"""`cuattn.attention` and `cuattn.attention_varlen`."""

from typing import Any

import cuattn
from cuattn import calls


def attention(
    q: Any,
    k: Any,
    v: Any,
    mask: str | None = "full",
    *,
    scale: float | None = None,
    key_padding_mask: Any = None,
    return_lse: bool = False,
    layout: str = "bhsd",
    out: Any = None,
    num_splits: int | None = None,
    kv_lengths: Any = None,
) -> Any:
    """Softmax attention ``softmax(scale * q k^T + mask) v`` whose every row is independent of the batch, bit for bit.

    q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv); with ``layout="bshd"`` (B, L, H, D). float16, bfloat16
        or float32; D and Dv multiples of 8 from 8 to 256. Hq is a multiple of Hkv: query head h reads key head
        ``h // (Hq // Hkv)``. torch, CuPy or NumPy arrays, or others that implement DLPack, on one device. Any strides
        with a contiguous last dimension and rows that start at multiples of 16 bytes; they are read in place.
    mask: "full" (or None), or "causal": query i sees the keys j <= i + Lk - Lq (bottom-right aligned). A row that sees
        no key is +0, with the LSE -inf.
    scale: finite float, D**-0.5 by default; may be 0 or negative.
    key_padding_mask: bool (B, Lk), any strides, True where a key exists: right or left padding, or holes. What stands
        elsewhere in k and v, NaN included, has no effect. The causal diagonal stays where it is: row i sees the keys
        that exist among j <= i + Lk - Lq. Not together with ``kv_lengths``.
    return_lse: also return the natural logarithm of each row's sum of exponentials, float32, contiguous (B, Hq, Lq).
    out: array to write to, of the result's shape and type; it is returned. It must not overlap the inputs. While torch
        records gradients, neither it nor q, k and v may require them.
    num_splits: a scheduling hint, None or a positive int. Every value gives the same bits.
    kv_lengths: int32 (B,), an array like the others: sequence b has the first kv_lengths[b] keys only (right padding);
        what lies behind, NaN included, is not read. The causal diagonal stays where it is. Read on the device: on a GPU
        wrong numbers are clamped, unless CUATTN_CHECK=1 has them checked.

    Returns the output, (B, Hq, Lq, Dv) in the layout of q, of q's dtype, array library and device, or ``(output,
    lse)``. On a GPU the work is queued on the caller's current stream without synchronising, and can be captured in a
    CUDA graph after a first call. A workspace comes from the caller's allocator: at most (blocks that fill the device)
    x (chunks of the longest possible sequence) x (up to 16 rows) x (Dv + 2) x 4 bytes, and for a key_padding_mask
    B x (2 Lk + 2) x 4 bytes. For the target sm_90a it has up to 64 rows in place of 16, for more than 64 rows of a key
    head (tiles of up to 192 rows) x chunks x 192 rows where they leave multiprocessors idle or num_splits is given, and
    above 192 columns of values another (rows) x 256 x 4 bytes.

    Gradients: torch records them for q, k and v, from the output and from the LSE. They are those of
    `attention_backward`, bit for bit, in eager mode, torch.compile, torch.func.grad, vjp and vmap (the mapped dimension
    becomes part of the batch), activation checkpoints and CUDA graphs. A backward pass runs on the backend of its
    forward pass; in a compiled function on the active one. Saved for it are q, k, v, the output, the LSE, and
    key_padding_mask or kv_lengths, nothing else. Double backward and forward-mode derivatives raise
    NotImplementedError; torch.func.grad inside a compiled function is refused by torch. Under torch.autocast q, k and v
    are cast as for torch's own attention. JAX: `cuattn.jax.attention`.

    Guarantee (docs/numerics.md): for one contract version, backend, GPU architecture, dtype, head dims and mask, the
    bits of a row depend on its query, on the keys and values that it sees, in their order, and on the scale. They do
    not depend on the batch, the position in it, padding, strides, layout, the number of query rows in the call (chunked
    prefill, decode), grouping of heads, splits, the stream or the run.

    Raises ValueError or TypeError for wrong arguments, before anything is launched; MissingDependencyError where a
    package is missing; NotImplementedError for a GPU that no kernel exists for.
    """
    if hasattr(q, "requires_grad"):  # a tensor of torch, which may have to see the operator
        autograd = cuattn.autograd
        q, k, v = autograd.cast(q, k, v)
        if autograd.is_needed(q, k, v, key_padding_mask, kv_lengths):
            return autograd.attention(
                q, k, v, mask, scale, key_padding_mask, return_lse, layout, out, num_splits, kv_lengths
            )
    return calls.attention(q, k, v, mask, scale, key_padding_mask, layout, num_splits, kv_lengths, out, return_lse)


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    mask: str | None = "full",
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: Any = None,
    num_splits: int | None = None,
) -> Any:
    """`attention` over sequences of different lengths, packed one behind the other, without padding.

    q: (Tq, Hq, D); k: (Tk, Hkv, D); v: (Tk, Hkv, Dv); dtypes, heads, head dims, strides and array libraries as in
        `attention`.
    cu_seqlens_q, cu_seqlens_k: int32 (sequences + 1,), contiguous, on the same device: sequence s has the query rows
        cu_seqlens_q[s] to cu_seqlens_q[s + 1], and keys likewise; they ascend from 0 to Tq and Tk. Sequences may be
        empty. They are read on the device, without synchronising: on a GPU wrong numbers are not noticed, unless
        CUATTN_CHECK=1 has them checked; they are clamped, so that no memory outside of the arrays is touched, and rows
        of no sequence are not written.
    mask: "causal" is aligned bottom-right in each sequence.
    max_seqlen_q, max_seqlen_k: accepted for the sake of other packages' signatures; not needed and not used.
    num_splits: a scheduling hint, None or a positive int. Every value gives the same bits.

    Returns the output (Tq, Hq, Dv), or ``(output, lse)`` with the LSE float32 (Hq, Tq). Workspace and gradients as in
    `attention`, for which the cumulative lengths are saved; torch.func.vmap is refused.

    Guarantee: every row has the bits that `attention` gives for its sequence alone. Errors as in `attention`.
    """
    if hasattr(q, "requires_grad"):
        autograd = cuattn.autograd
        q, k, v = autograd.cast(q, k, v)
        if autograd.is_needed(q, k, v, cu_seqlens_q, cu_seqlens_k):
            bounds = max_seqlen_q, max_seqlen_k
            return autograd.attention_varlen(
                q, k, v, cu_seqlens_q, cu_seqlens_k, mask, *bounds, scale, return_lse, out, num_splits
            )
    return calls.attention_varlen(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, mask, max_seqlen_q, max_seqlen_k, scale, num_splits, out, return_lse)
    )
