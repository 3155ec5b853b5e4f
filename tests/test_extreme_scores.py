"""Scores beyond the range of fp32: no useful result, but the same bits however the row is asked for."""

import numpy as np
import pytest
from backends import on_every_backend

from cuattn import testing
from cuattn.testing.subject import Operation

SCALES = [1e37, 1e300, -1e37, 3e38]


@pytest.mark.parametrize("scale", SCALES)
@on_every_backend
def test_a_decoded_row_is_the_prefilled_one(attention: Operation, scale: float) -> None:
    """Some rows share a warp with a row that sees one tile more: a tile that a row does not see must change nothing."""
    q, k = np.ones((1, 1, 140, 64), np.float16), np.ones((1, 1, 144, 64), np.float16)
    out, lse = attention(q, k, k, "causal", scale=scale, return_lse=True)
    for row in (0, 111, 112, 123, 124, 139):
        one = attention(
            q[:, :, row : row + 1], k[:, :, : row + 5], k[:, :, : row + 5], "causal", scale=scale, return_lse=True
        )
        testing.assert_bitwise_equal(one[0], out[:, :, row : row + 1])
        testing.assert_bitwise_equal(one[1], lse[:, :, row : row + 1])


@on_every_backend
def test_above_the_range_is_nan_and_below_it_sees_nothing(attention: Operation) -> None:
    q = np.ones((1, 1, 3, 64), np.float16)
    out, lse = attention(q, q, q, scale=1e37, return_lse=True)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()
    out, lse = attention(-q, q, q, scale=1e37, return_lse=True)
    testing.assert_bitwise_equal(out, np.zeros_like(q))
    assert (lse == -np.inf).all()
