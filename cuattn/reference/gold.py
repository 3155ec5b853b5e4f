"""The gold answer: softmax attention in float64, written to be read and not to be fast."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def visible_keys(len_q: int, len_k: int, mask: str | None) -> NDArray[np.int64]:
    """How many leading keys each query row sees, (len_q,): all of them, or bottom-right aligned causal.

    Raises ValueError for an unknown mask.
    """
    if mask in ("full", None):
        return np.full(len_q, len_k)
    if mask == "causal":
        return np.clip(len_k - len_q + 1 + np.arange(len_q), 0, len_k)
    raise ValueError(f"mask: got {mask!r}, expected 'full', 'causal' or None")


def gold_attention(
    q: Float64,
    k: Float64,
    v: Float64,
    mask: str | None = "full",
    scale: float | None = None,
    key_padding_mask: NDArray[np.bool_] | None = None,
) -> tuple[Float64, Float64]:
    """Attention of finite float64 inputs: q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv).

    Returns the output (B, Hq, Lq, Dv) and the LSE (B, Hq, Lq), a natural logarithm. ``scale`` defaults to ``D**-0.5``.
    ``key_padding_mask`` (B, Lk) is True where a key exists; the others may hold anything. A row that sees no key gives
    0 and -inf. The scores of all heads are in memory at once: B * Hq * Lq * Lk * 8 bytes, several times over.
    """
    weights, lse, _, values = _weights(q, k, v, mask, scale, key_padding_mask)
    return weights @ values, lse


def gold_gradients(
    dout: Float64,
    q: Float64,
    k: Float64,
    v: Float64,
    mask: str | None = "full",
    scale: float | None = None,
    key_padding_mask: NDArray[np.bool_] | None = None,
    dlse: Float64 | None = None,
) -> tuple[Float64, Float64, Float64]:
    """The gradients of q, k and v, where dout (B, Hq, Lq, Dv) and dlse (B, Hq, Lq) are those of `gold_attention`'s
    results. Rows that see no key contribute nothing.
    """
    weights, _, keys, values = _weights(q, k, v, mask, scale, key_padding_mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dweights = dout @ values.swapaxes(-1, -2)
    delta = (weights * dweights).sum(axis=-1) - (0.0 if dlse is None else dlse)
    dscores = scale * weights * (dweights - delta[..., None])

    def of_key_heads(x: Float64) -> Float64:  # the sum over query heads that share a key head
        summed: Float64 = x.reshape(x.shape[0], k.shape[1], -1, *x.shape[2:]).sum(axis=2)
        return summed

    return dscores @ keys, of_key_heads(dscores.swapaxes(-1, -2) @ q), of_key_heads(weights.swapaxes(-1, -2) @ dout)


def _weights(
    q: Float64, k: Float64, v: Float64, mask: str | None, scale: float | None, key_padding_mask: Any
) -> tuple[Float64, Float64, Float64, Float64]:
    """Normalised weights (B, Hq, Lq, Lk), the LSE (B, Hq, Lq), and for each query head its keys and values."""
    group = q.shape[1] // k.shape[1]
    exists = np.ones((k.shape[0], k.shape[2]), bool) if key_padding_mask is None else key_padding_mask
    # 0 * NaN is NaN
    k, v = (np.where(exists[:, None, :, None], np.repeat(x, group, axis=1), 0.0) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    scores = scale * (q @ k.swapaxes(-1, -2))  # (B, Hq, Lq, Lk)
    seen = np.arange(k.shape[2]) < visible_keys(q.shape[2], k.shape[2], mask)[:, None]
    scores = np.where(seen & exists[:, None, None, :], scores, -np.inf)
    highest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    reference = np.where(np.isfinite(highest), highest, 0.0)  # -inf - -inf is NaN
    weights = np.exp(scores - reference)
    total = weights.sum(axis=-1, keepdims=True)  # 0 only where nothing is seen
    with np.errstate(divide="ignore"):
        lse = reference + np.log(total)
    return weights / np.where(total > 0, total, 1.0), lse[..., 0], k, v
