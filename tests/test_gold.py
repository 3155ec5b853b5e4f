"""The float64 gold answer against another implementation and against definitions."""

from typing import Any

import numpy as np
import pytest
import torch

from cuattn.reference.gold import gold_attention, visible_keys


def _random(batch: int, heads: int, kv_heads: int, len_q: int, len_k: int, head_dim: int = 8) -> list[Any]:
    random = np.random.default_rng(1)
    shapes = (heads, len_q), (kv_heads, len_k), (kv_heads, len_k)
    return [random.standard_normal((batch, h, length, head_dim)) for h, length in shapes]


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize(("len_q", "len_k"), [(1, 1), (5, 9), (7, 7), (9, 5)])
@pytest.mark.parametrize("scale", [None, 0.3, -2.0, 0.0])
def test_equals_torch(mask: str | None, len_q: int, len_k: int, scale: float | None) -> None:
    q, k, v = _random(2, 4, 2, len_q, len_k)
    out, lse = gold_attention(q, k, v, mask, scale)
    seen = torch.ones(len_q, len_k, dtype=torch.bool)
    seen = seen.tril(len_k - len_q) if mask == "causal" else seen
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x) for x in (q, k, v)), attn_mask=seen, scale=scale, enable_gqa=True
    ).nan_to_num(0.0)
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-12, atol=1e-14)
    factor = 8**-0.5 if scale is None else scale
    scores = torch.from_numpy(factor * q @ np.repeat(k, 2, axis=1).swapaxes(2, 3)).masked_fill(~seen, -np.inf)
    np.testing.assert_allclose(lse, scores.logsumexp(-1).numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("value_dim", [3, 11])
def test_value_dim_of_its_own(value_dim: int) -> None:
    q, k, _ = _random(2, 4, 2, 5, 9)
    v = np.random.default_rng(2).standard_normal((2, 2, 9, value_dim))
    out, _ = gold_attention(q, k, v, "causal")
    columns = [gold_attention(q, k, v[..., [i] * 8], "causal")[0][..., 0] for i in range(value_dim)]
    np.testing.assert_allclose(out, np.stack(columns, axis=-1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize(("len_q", "len_k"), [(5, 9), (9, 5)])
def test_key_padding_mask_equals_torch(mask: str, len_q: int, len_k: int) -> None:
    q, k, v = _random(3, 4, 2, len_q, len_k)
    exists = np.random.default_rng(3).random((3, len_k)) < 0.5
    exists[1], exists[2] = True, False
    seen = torch.from_numpy(exists)[:, None, None, :].expand(3, 1, len_q, len_k)
    seen = seen.tril(len_k - len_q) if mask == "causal" else seen
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x) for x in (q, k, v)), attn_mask=seen, enable_gqa=True
    ).nan_to_num(0.0)
    for x in (k, v):
        x[~np.broadcast_to(exists[:, None], x.shape[:3])] = np.nan
    out, lse = gold_attention(q, k, v, mask, key_padding_mask=exists)
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-12, atol=1e-14)
    assert (np.isneginf(lse) == ~seen.any(dim=-1).numpy()).all()
    assert not np.allclose(out[0], gold_attention(q, *np.nan_to_num((k, v)), mask)[0][0])


def test_rows_that_see_nothing_are_zero() -> None:
    out, lse = gold_attention(*_random(1, 1, 1, 5, 2), "causal")
    assert not out[:, :, :3].any()
    assert (lse[:, :, :3] == -np.inf).all()
    assert np.isfinite(lse[:, :, 3:]).all()


def test_no_keys_and_no_rows() -> None:
    out, lse = gold_attention(*_random(2, 1, 1, 3, 0))
    assert not out.any()
    assert (lse == -np.inf).all()
    assert gold_attention(*_random(2, 1, 1, 0, 3), "causal")[0].shape == (2, 1, 0, 8)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = _random(1, 1, 1, 4, 6)
    out, lse = gold_attention(1e4 * q, k, v)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()


@pytest.mark.parametrize(
    ("len_q", "len_k", "mask", "counts"),
    [
        (3, 5, "full", [5, 5, 5]),
        (3, 5, None, [5, 5, 5]),
        (3, 5, "causal", [3, 4, 5]),
        (4, 2, "causal", [0, 0, 1, 2]),
        (0, 2, "causal", []),
    ],
)
def test_visible_keys(len_q: int, len_k: int, mask: str | None, counts: list[int]) -> None:
    assert visible_keys(len_q, len_k, mask).tolist() == counts


def test_unknown_mask() -> None:
    with pytest.raises(ValueError, match="mask: got 'window', expected 'full', 'causal' or None"):
        visible_keys(1, 1, "window")
