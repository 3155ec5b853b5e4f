"""`torch.nn.functional.scaled_dot_product_attention`, batch-invariant."""

import math
from typing import Any

from cuattn.api import attention
from cuattn.compat.tensors import attend, check_tensors, require


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Softmax attention with the signature and the meaning of torch's, whose every row is independent of the batch.

    query: (..., Hq, L, E); key: (..., H, S, E); value: (..., H, S, Ev). torch tensors of float16, bfloat16 or float32,
        E and Ev from 1 to 256, in memory of any form: what kernels cannot read in place is copied, and head dims that
        are no multiples of 8 are copied with zeros behind them. Any number of leading dimensions, also none and no
        heads; they are broadcast as torch broadcasts them.
    attn_mask: None or bool, broadcastable to (..., Hq, L, S), True where a key takes part. It has to be a padding of
        keys, a causal mask aligned top-left (j <= i) or bottom-right (j <= i + S - L), or the conjunction of a padding
        and a causal mask. A mask whose query axis has the size 1 or the stride 0, such as (B, 1, 1, S), also when it
        is expanded, is a padding, and its elements are not read here. A mask with a row for each query is read to see
        what it is, on the CPU only: on a GPU that would wait for the device, and in a compiled function it cannot be
        done; pass ``is_causal=True``, a padding, or both.
    dropout_p: 0.0.
    is_causal: query i sees the keys j <= i: aligned TOP-LEFT, unlike "causal" of `cuattn.attention`, also where L and S
        differ. Together with ``attn_mask``, which some backends of torch refuse, both apply.
    scale: finite float, E**-0.5 by default.
    enable_gqa: query head h reads key head ``h // (Hq // H)``. Without it other heads than the query's are refused, all
        but a single one, which is broadcast.

    Returns (..., Hq, L, Ev), of query's dtype and device. A row that sees no key is +0 and has no gradients; torch
    gives 0 or NaN, depending on its version and backend. Gradients, torch.compile, torch.autocast and streams as in
    `cuattn.attention`. L > S with a causal mask takes two calls of it, all else one.

    Guarantee: every row has the bits that `cuattn.attention` gives for the keys that it sees: alone, in a batch, or
    padded by ``attn_mask``, whatever stands where it is False, NaN included.

    Raises NotImplementedError for a float mask, other bool masks, and dropout; ValueError or TypeError for wrong
    arguments. Those that `cuattn.attention` raises call query, key and value q, k and v.
    """
    check_tensors(query=query, key=key, value=value)
    require(dropout_p == 0, "dropout_p", dropout_p, "0.0")
    batch, q, k, v = _with_one_batch(query, key, value, enable_gqa)
    heads, rows, keys = q.shape[1], q.shape[2], k.shape[2]
    padding, diagonal = None, 0 if is_causal else None
    if attn_mask is not None:
        padding, found = _read_mask(attn_mask, (*batch, heads, rows, keys))
        if found is not None:
            diagonal = found if diagonal is None else min(diagonal, found)
    if padding is not None:
        if padding.shape[-2] == 1:  # one for all heads
            padding = padding.squeeze(-2).expand(*batch, keys).reshape(-1, keys)
        else:
            padding = padding.expand(*batch, heads, keys).reshape(-1, keys)
            q, k, v = (_heads_as_batch(x, heads) for x in (q, k, v))
    out = _attend(q, k, v, diagonal, padding, scale)
    without_heads = query.dim() == key.dim() == value.dim() == 2
    return out[0, 0] if without_heads else out.reshape(*batch, heads, rows, value.shape[-1])


def _with_one_batch(query: Any, key: Any, value: Any, enable_gqa: bool) -> tuple[Any, Any, Any, Any]:
    """The common leading dimensions, and the inputs as (B, H, L, E)."""
    import torch

    inputs = (query, key, value)
    for name, x in zip(("query", "key", "value"), inputs, strict=True):
        if x.dim() < 2:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected at least 2 dimensions (L, E)")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value: got length {value.shape[-2]}, expected key's {key.shape[-2]}")
    inputs = tuple(x.unsqueeze(0) if x.dim() == 2 else x for x in inputs)
    shared = 3 if enable_gqa else 2
    leading = [tuple(x.shape[:-shared]) for x in inputs]
    common = leading[0]
    if leading[1] != common or leading[2] != common:
        try:
            common = tuple(torch.broadcast_shapes(*leading))
        except RuntimeError:
            hint = "" if enable_gqa else " (enable_gqa=True shares heads)"
            raise ValueError(
                f"key, value: got leading dimensions {leading[1]}, {leading[2]}, "
                f"expected ones that broadcast with query's {leading[0]}{hint}"
            ) from None
        inputs = tuple(x.expand(*common, *x.shape[-shared:]) for x in inputs)
    batch = common if enable_gqa else common[:-1]
    if len(batch) != 1:
        inputs = tuple(x.reshape(math.prod(batch), *x.shape[-3:]) for x in inputs)
    return batch, *inputs


def _heads_as_batch(x: Any, heads: int) -> Any:
    """(B, H, L, E) -> (B * heads, 1, L, E), every head of a group with its keys."""
    if x.shape[1] not in (0, heads):
        x = x.repeat_interleave(heads // x.shape[1], 1)
    return x.flatten(0, 1).unsqueeze(1)


def _attend(q: Any, k: Any, v: Any, diagonal: int | None, padding: Any, scale: float | None) -> Any:
    """Query i sees the keys j <= i + diagonal; all of them without one."""
    import torch

    rows, keys = q.shape[2], k.shape[2]

    def part(q: Any, mask: str, end: int) -> Any:
        mine, mask_of_keys = (k, v), padding
        if end < keys:
            mine = k[:, :, :end], v[:, :, :end]
            mask_of_keys = None if padding is None else padding[:, :end]
        return attend(attention, q, *mine, mask, scale=scale, key_padding_mask=mask_of_keys)

    if diagonal is None:
        return part(q, "full", keys)
    if rows + diagonal <= keys:  # the last query sees the last of these keys
        return part(q, "causal", rows + diagonal)
    first = keys - diagonal  # from here on queries see all keys
    return torch.cat([part(q[:, :, :first], "causal", keys), part(q[:, :, first:], "full", keys)], 2)


def _read_mask(mask: Any, shape: tuple[int, ...]) -> tuple[Any, int | None]:
    """The padding of keys in a mask for scores of ``shape``, (..., Hq or 1, S), and its diagonal, None without one."""
    import torch

    check_tensors(attn_mask=mask)
    expected = "bool that is a padding of keys, a causal mask or both"
    require(mask.dtype == torch.bool, "attn_mask", f"dtype {str(mask.dtype).removeprefix('torch.')}", expected)
    sizes = tuple(mask.shape)
    missing = len(shape) - len(sizes)
    if missing < 0 or any(size not in (1, n) for size, n in zip(sizes, shape[missing:], strict=True)):
        raise ValueError(f"attn_mask: got shape {sizes}, expected one that broadcasts to {shape}")
    rows, keys = shape[-2:]
    if 0 in (rows, keys):
        return None, None
    mask = mask[(None,) * missing].expand(*(-1,) * (len(shape) - 1), keys)
    for axis, stride in enumerate(mask.stride()[:-1]):
        if stride == 0 and mask.shape[axis] > 1:
            mask = mask.narrow(axis, 0, 1)
    if mask.shape[-2] == 1:
        return mask.squeeze(-2), None
    require(
        mask.device.type == "cpu" and not torch.compiler.is_compiling(),
        "attn_mask",
        f"shape {sizes}, a row for each query, on {mask.device}",
        "is_causal=True, a padding such as (B, 1, 1, S), or both, none of which has to be read here",
    )
    padding = mask.any(-2, keepdim=True)
    if torch.equal(mask, padding.expand_as(mask)):
        return padding.squeeze(-2), None
    for diagonal in (keys - rows, 0):
        if torch.equal(mask, padding & torch.ones(rows, keys, dtype=torch.bool).tril(diagonal)):
            return padding.squeeze(-2), diagonal
    raise NotImplementedError(f"attn_mask: got another bool mask, expected {expected}")
