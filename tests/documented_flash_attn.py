"""What flash-attn documents, written out in float64, for the tests of the functions that stand in for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def bottom_right(rows: int, keys: int) -> Tensor:
    return torch.arange(keys) <= torch.arange(rows)[:, None] + keys - rows


def documented(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """One sequence, (tokens, heads, columns), in float64: the output and the LSE (heads, tokens)."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(~bottom_right(len(q), len(k)), -torch.inf)
    lse = scores.logsumexp(2)
    weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    return torch.einsum("hij,jhd->ihd", weights, v), lse


def assert_close(got: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> None:
    """The output of that dtype, the LSE in float32."""
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
