"""The standard cases: lengths on both sides of every tile and chunk edge, in four sizes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, product
from typing import Any

from cuattn.config import DTYPES
from cuattn.testing.inputs import FAMILIES, Case

#: A head dim, or one of queries and keys and one of values.
HeadDim = int | tuple[int, int]
#: The head dims of most models, which get every shape, and others.
COMMON_HEAD_DIMS = (64, 128)
HEAD_DIMS: tuple[HeadDim, ...] = (*COMMON_HEAD_DIMS, 96, 192, 256, (192, 128))

_SMALL = [(3, 4, 2, 113, 203), (1, 2, 1, 1, 1), (1, 2, 1, 20, 530), (1, 2, 1, 3, 2100)]
_LARGE = [
    (3, 4, 2, 113, 203),
    (1, 2, 1, 1, 1),
    (2, 2, 2, 128, 128),
    (1, 2, 1, 799, 3),
    (1, 1, 1, 1023, 1024),
    (1, 1, 1, 64, 4097),
]
#: (batch, heads, kv_heads, len_q, len_k) of the invariance sweep.
_SWEEP = {
    "tiny": [(2, 4, 2, 17, 80), (1, 1, 1, 1, 1), (1, 1, 1, 40, 3), (1, 1, 1, 130, 530), (1, 2, 1, 3, 1100)],
    "small": _SMALL,
    "large": _LARGE,
    "device": [*_LARGE, (9, 16, 4, 257, 300), (40, 8, 1, 1, 700)],  # more blocks than multiprocessors
}
#: Few rows and many chunks, which are spread over blocks: of size "device", for each variant one in turn.
_LONG = [(1, 8, 1, 1, 8300), (3, 4, 1, 2, 16500), (1, 4, 2, 3, 33000), (1, 4, 1, 1, 131072)]
#: Sequences of 11, 16, 13 and 19 tokens, 59 together, padded to 20.
WORKLOAD = Case(20, 20, "causal", "bfloat16", 128, 4, 32, 8, lengths=(11, 16, 13, 19))
#: (heads, kv_heads, len_q, len_k) of the accuracy table: for most families, and for the long context.
_ACCURACY = {
    "tiny": ((1, 1, 16, 128), (1, 1, 16, 2200)),
    "small": ((2, 1, 128, 256), (1, 1, 16, 2200)),
    "large": ((2, 1, 256, 384), (1, 1, 16, 16500)),
    "device": ((4, 2, 512, 1024), (1, 1, 64, 70000)),
}
_ROWS_TO_SUM = 128
#: Sizes: "tiny" for the emulator, "small", "large", and "device", which a CPU is too slow for.
SIZES = tuple(_SWEEP)


def standard_cases(
    size: str = "small",
    dtypes: Sequence[str] = DTYPES,
    head_dims: Sequence[HeadDim] = HEAD_DIMS,
    masks: Sequence[str] = ("causal", "full"),
) -> Iterator[Case]:
    """Cases of an invariance sweep: the shapes of ``size``, one of SIZES, in every variant.

    Head dims other than COMMON_HEAD_DIMS get the first shape alone, with one mask in turn.
    """
    long = cycle(_LONG)
    for (i, dtype), (j, head_dim) in product(enumerate(dtypes), enumerate(head_dims)):
        common = head_dim in COMMON_HEAD_DIMS
        for mask in masks if common else [masks[(i + j) % len(masks)]]:
            shapes = _SWEEP[size] if common else _SWEEP[size][:1]
            more = [next(long)] if common and size == "device" else []
            for batch, heads, kv_heads, len_q, len_k in (*shapes, *more):
                yield _case(len_q, len_k, mask, dtype, head_dim, batch, heads, kv_heads)
    asked = WORKLOAD.dtype in dtypes and WORKLOAD.head_dim in head_dims and WORKLOAD.mask in masks
    if size == "device" and asked:
        yield WORKLOAD


def accuracy_cases(
    size: str = "small",
    dtypes: Sequence[str] = DTYPES,
    head_dims: Sequence[HeadDim] = HEAD_DIMS,
    masks: Sequence[str] = ("causal", "full"),
) -> Iterator[Case]:
    """Cases of an accuracy table: every family of inputs in every variant."""
    short, long = _ACCURACY[size]
    for dtype, head_dim, mask, family in product(dtypes, head_dims, masks, FAMILIES):
        heads, kv_heads, len_q, len_k = long if family == "long context" else short
        yield _case(len_q, len_k, mask, dtype, head_dim, 1, heads, kv_heads, family)


def gradient_accuracy_cases(
    size: str = "small",
    dtypes: Sequence[str] = DTYPES,
    head_dims: Sequence[HeadDim] = HEAD_DIMS,
    masks: Sequence[str] = ("causal", "full"),
) -> Iterator[Case]:
    """The same for gradients: dk and dv are sums over rows, of which there are enough for no row to decide."""
    for case in accuracy_cases(size, dtypes, head_dims, masks):
        yield replace(case, len_q=max(case.len_q, _ROWS_TO_SUM))


def _case(len_q: int, len_k: int, mask: str, dtype: str, head_dim: HeadDim, *more: Any) -> Case:
    query_dim, value_dim = (head_dim, None) if isinstance(head_dim, int) else head_dim
    return replace(Case(len_q, len_k, mask, dtype, query_dim, *more), value_dim=value_dim)
