"""`cuattn.attention` and `cuattn.attention_varlen`: checks, the choice of a backend, the launch."""

from typing import Any

from cuattn import backend as backends
from cuattn import emulator, reference
from cuattn.checks import check_attention, check_out, check_varlen
from cuattn.config import select_config
from cuattn.interop import Tensor
from cuattn.launch import device_architecture, launch_kernel
from cuattn.problem import Problem, in_kernel_axes
from cuattn.schedule import plan_forward


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

    q: (B, Hq, Lq, D); k, v: (B, Hkv, Lk, D); with ``layout="bshd"`` (B, L, H, D). float16 or bfloat16; D a multiple of
        8 from 8 to 128. Hq is a multiple of Hkv: query head h reads key head ``h // (Hq // Hkv)``. torch, CuPy or NumPy
        arrays, or others that implement DLPack, on one device. Any strides with a contiguous last dimension and rows
        that start at multiples of 16 bytes; they are read in place.
    mask: "full" (or None), or "causal": query i sees the keys j <= i + Lk - Lq (bottom-right aligned). A row that sees
        no key is +0, with the LSE -inf.
    scale: finite float, D**-0.5 by default; may be 0 or negative.
    key_padding_mask: must be None in this release.
    return_lse: also return the natural logarithm of each row's sum of exponentials, float32, contiguous (B, Hq, Lq).
    out: array to write to, of the result's shape and type; it is returned. It must not overlap the inputs, nor require
        gradients while torch records them.
    num_splits: a scheduling hint, None or a positive int. Every value gives the same bits.
    kv_lengths: int32 (B,), an array like the others: sequence b has the first kv_lengths[b] keys only (right padding);
        what lies behind, NaN included, is not read. The causal diagonal stays where it is. Read on the device.

    Returns the output, of q's shape, dtype, array library and device, or ``(output, lse)``. On a GPU the work is queued
    on the caller's current stream without synchronising, and can be captured in a CUDA graph after a first call. There
    is no autograd: results do not require gradients.

    Guarantee (docs/numerics.md): for one contract version, backend, GPU architecture, dtype, head dim and mask, the
    bits of a row depend on its query, on the keys and values that it sees, in their order, and on the scale. They do
    not depend on the batch, the position in it, strides, layout, the number of query rows in the call (chunked prefill,
    decode), grouping of heads, splits, the stream or the run.

    Raises ValueError, TypeError, or NotImplementedError for what a later release brings, before anything is launched;
    MissingDependencyError where a package is missing.
    """
    problem = check_attention(q, k, v, mask, scale, key_padding_mask, layout, num_splits, kv_lengths)
    return _attend(problem, out, return_lse)


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

    q: (Tq, Hq, D); k, v: (Tk, Hkv, D); dtypes, heads, head dims, strides and array libraries as in `attention`.
    cu_seqlens_q, cu_seqlens_k: int32 (sequences + 1,), contiguous, on the same device: sequence s has the query rows
        cu_seqlens_q[s] to cu_seqlens_q[s + 1], and keys likewise; they ascend from 0 to Tq and Tk. Sequences may be
        empty. They are read on the device, without synchronising: on a GPU wrong numbers are not noticed; they are
        clamped, so that no memory outside of the arrays is touched, and rows of no sequence are not written.
    mask: "causal" is aligned bottom-right in each sequence.
    max_seqlen_q, max_seqlen_k: accepted for the sake of other packages' signatures; not needed and not used.

    Returns the output (Tq, Hq, D), or ``(output, lse)`` with the LSE float32 (Hq, Tq).

    Guarantee: every row has the bits that `attention` gives for its sequence alone. Errors as in `attention`.
    """
    problem = check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, mask, max_seqlen_q, max_seqlen_k, scale, num_splits)
    return _attend(problem, out, return_lse)


def _attend(problem: Problem, out: Any, return_lse: bool) -> Any:
    backend = backends.active().for_device(problem.query.device)
    query = problem.query
    framework = query.framework
    if out is None:
        made = framework.empty(problem.out_shape, query.dtype, query.device, query)
        result = in_kernel_axes(made, problem.layout)
    else:
        result = check_out(out, problem)
    lse = framework.empty(problem.lse_shape, "float32", query.device, query)
    if 0 not in lse.shape:
        _run(backend, problem, result, lse)
        if out is not None:
            framework.written(result)
    if out is None:
        out = framework.export(made, query)
    return (out, framework.export(lse, query)) if return_lse else out


def _run(backend: backends.Backend, problem: Problem, out: Tensor, lse: Tensor) -> None:
    if backend.name == "reference":
        reference.forward(problem, out, lse)
        return
    query = problem.query
    arch = backend.arch or device_architecture(query.device.index)
    ragged = problem.sequences is not None
    config = select_config(problem.head_dim, problem.mask, query.dtype, arch, ragged)
    plan = plan_forward(config, problem, out, lse)
    if backend.name == "emulator":
        inputs = {"q": query, "k": problem.key, "v": problem.value}
        if problem.sequences:
            inputs |= problem.sequences.arrays
        emulator.forward(config, plan, inputs, {"out": out, "lse": lse})
    else:
        stream = query.framework.stream(query.device)
        launch_kernel(config, plan.grid, plan.shared_bytes, plan.params, query.device.index, stream)
