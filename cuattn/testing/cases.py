"""The standard cases: lengths on both sides of every tile and chunk edge, in four sizes."""

from collections.abc import Iterator
from itertools import product

from cuattn.testing.inputs import FAMILIES, Case

_SMALL = [(3, 4, 2, 113, 203), (1, 2, 1, 1, 1), (1, 2, 1, 20, 530)]
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
    "tiny": [(2, 4, 2, 17, 80), (1, 1, 1, 1, 1), (1, 1, 1, 40, 3), (1, 1, 1, 130, 530)],
    "small": _SMALL,
    "large": _LARGE,
    "device": [*_LARGE, (9, 16, 4, 257, 300), (40, 8, 1, 1, 700)],  # more blocks than multiprocessors
}
#: (heads, kv_heads, len_q, len_k) of the accuracy table: for most families, and for the long context.
_ACCURACY = {
    "tiny": ((1, 1, 16, 128), (1, 1, 16, 2200)),
    "small": ((2, 1, 128, 256), (1, 1, 16, 2200)),
    "large": ((2, 1, 256, 384), (1, 1, 16, 16500)),
    "device": ((4, 2, 512, 1024), (1, 1, 64, 70000)),
}
#: Sizes: "tiny" for the emulator, "small", "large", and "device", which a CPU is too slow for.
SIZES = tuple(_SWEEP)


def standard_cases(
    size: str = "small",
    dtypes: tuple[str, ...] = ("float16", "bfloat16"),
    head_dims: tuple[int, ...] = (64, 128),
    masks: tuple[str, ...] = ("causal", "full"),
) -> Iterator[Case]:
    """Cases of an invariance sweep: every shape of ``size``, one of SIZES, in every variant."""
    for dtype, head_dim, mask in product(dtypes, head_dims, masks):
        for batch, heads, kv_heads, len_q, len_k in _SWEEP[size]:
            yield Case(len_q, len_k, mask, dtype, head_dim, batch, heads, kv_heads)


def accuracy_cases(
    size: str = "small",
    dtypes: tuple[str, ...] = ("float16", "bfloat16"),
    head_dims: tuple[int, ...] = (64, 128),
    masks: tuple[str, ...] = ("causal", "full"),
) -> Iterator[Case]:
    """Cases of an accuracy table: every family of inputs in every variant."""
    short, long = _ACCURACY[size]
    for dtype, head_dim, mask, family in product(dtypes, head_dims, masks, FAMILIES):
        heads, kv_heads, len_q, len_k = long if family == "long context" else short
        yield Case(len_q, len_k, mask, dtype, head_dim, 1, heads, kv_heads, family)
