"""Head dims other than the tiles' 64 and 128: columns that a tile has too many are zeros and are not written."""

import numpy as np
import pytest
from backends import REFERENCE, SM_80, SM_90A, attention_on, on_every_backend

from cuattn import config, testing
from cuattn.testing.subject import Operation

Backend = tuple[str, str | None]
#: On the emulator, where every head dim is a kernel to compile: the ends of tiles, of groups of 16, and between.
CHOICES = [
    *((REFERENCE, head_dim) for head_dim in config.HEAD_DIMS),
    *((SM_80, head_dim) for head_dim in (8, 16, 40, 72, 96, 120, 136, 192, 200, 256)),
    *((SM_90A, head_dim) for head_dim in (24, 104, 248)),
]
DECODED = [
    *((REFERENCE, head_dim) for head_dim in (8, 120, 200)),
    *((SM_80, head_dim) for head_dim in (8, 120, 200)),
    (SM_90A, 72),
]
CASE = {"batch": 2, "heads": 2, "kv_heads": 1, "len_q": 37, "len_k": 150, "mask": "causal"}


@pytest.mark.parametrize(("backend", "head_dim"), CHOICES, ids=str)
def test_accuracy(backend: Backend, head_dim: int) -> None:
    case = testing.Case(dtype="float16", head_dim=head_dim, **CASE)
    testing.assert_accurate(attention_on(backend), case)


@pytest.mark.parametrize(("backend", "head_dim"), DECODED, ids=str)
def test_a_decoded_row_is_the_prefilled_one(backend: Backend, head_dim: int) -> None:
    """The prefill has more rows than the kernel for few rows takes."""
    attention, rng = attention_on(backend), np.random.default_rng(head_dim)
    q, k, v = (rng.standard_normal((1, 2, n, head_dim)).astype(np.float16) for n in (70, 200, 200))
    prefill = attention(q, k, v, "causal")
    decode = attention(q[:, :, 20:21], k[:, :, :151], v[:, :, :151], "causal")
    testing.assert_bitwise_equal(decode, prefill[:, :, 20:21])
    with pytest.raises(testing.BitwiseMismatch):  # the control: one key more
        testing.assert_bitwise_equal(
            attention(q[:, :, 20:21], k[:, :, :152], v[:, :, :152], "causal"), prefill[:, :, 20:21]
        )


@on_every_backend
def test_columns_behind_the_head_dim_are_neither_read_nor_written(attention: Operation) -> None:
    """Views of wider arrays whose other columns are NaN, in and out."""
    rng = np.random.default_rng(0)
    wide = [np.full((1, 1, n, 48), np.nan, np.float16) for n in (9, 30, 30, 9)]
    q, k, v, out = (array[..., 8:32] for array in wide)
    for array in (q, k, v):
        array[...] = rng.standard_normal(array.shape)
    testing.assert_bitwise_equal(attention(q, k, v, out=out), attention(q.copy(), k.copy(), v.copy()))
    assert np.isnan(wide[3][..., :8]).all()
    assert np.isnan(wide[3][..., 32:]).all()
    assert np.isfinite(out).all()
