"""Four prompts, 59 tokens: alone, packed, padded on either side, in chunks, in another order: the same bits."""

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
from backends import REFERENCE, SM_80
from packed import Both, assert_both_equal, bits_of
from surface import Prompt, fed

import cuattn
from cuattn import testing
from cuattn.testing import BitwiseMismatch, TorchLibrary
from cuattn.testing.arrays import int32_array

LENGTHS = (11, 16, 13, 19)
ORDERS = ((0, 1, 2, 3), (2, 0, 3, 1))
CHUNK, PADDED_LENGTH = 7, 20
HEAD_DIM, DTYPE = 128, "bfloat16"
TORCH = TorchLibrary()
INPUTS = testing.workload_inputs()
#: Bits of each prompt's q (32, tokens, 128), k and v (8, tokens, 128).
PROMPTS: list[Prompt] = [
    tuple(INPUTS[name][first:last].swapaxes(0, 1) for name in "qkv")
    for first, last in pairwise(accumulate(LENGTHS, initial=0))
]
Way = Callable[[list[Prompt]], list[Both]]


def array(x: Any) -> Any:
    return TORCH.array(x, DTYPE)


def attend(*arrays: Any, **options: Any) -> Both:
    return bits_of(cuattn.attention(*arrays, "causal", return_lse=True, **options))


def alone(prompts: list[Prompt]) -> list[Both]:
    results = (attend(*(array(x[None]) for x in prompt)) for prompt in prompts)
    return [(out[0], lse[0]) for out, lse in results]


def packed(prompts: list[Prompt]) -> list[Both]:
    starts = list(accumulate((q.shape[1] for q, _, _ in prompts), initial=0))
    assert starts[-1] == 59
    arrays = (array(np.concatenate([x.swapaxes(0, 1) for x in own])) for own in zip(*prompts, strict=True))
    cumulative = int32_array(TORCH, starts)
    out, lse = bits_of(cuattn.attention_varlen(*arrays, cumulative, cumulative, "causal", return_lse=True))
    return [(out[a:b].swapaxes(0, 1), lse[:, a:b]) for a, b in pairwise(starts)]


def padded(prompts: list[Prompt], left: bool, masked: bool = True) -> list[Both]:
    """Queries, keys and values of 20 tokens each, NaN where a prompt has none; only its own rows count.

    Not ``masked``: zeros there, and nothing that says so.
    """
    fill = 0xFFFF if masked else 0
    arrays = [np.full((len(prompts), len(x), PADDED_LENGTH, HEAD_DIM), fill, np.uint16) for x in prompts[0]]
    exists = np.zeros((len(prompts), PADDED_LENGTH), bool)
    spans = [slice(PADDED_LENGTH - n, None) if left else slice(n) for n in (q.shape[1] for q, _, _ in prompts)]
    for b, (prompt, span) in enumerate(zip(prompts, spans, strict=True)):
        exists[b, span] = True
        for whole, x in zip(arrays, prompt, strict=True):
            whole[b, :, span] = x
    mask = TORCH.array(exists.view(np.uint8), "bool") if masked else None
    out, lse = attend(*(array(x) for x in arrays), key_padding_mask=mask)
    return [(out[b, :, span], lse[b, :, span]) for b, span in enumerate(spans)]


def in_chunks(prompts: list[Prompt], page_size: int | None, wrong: int = 0) -> list[Both]:
    """Through a cache, seven tokens of each prompt at a time; the longest comes in 7, 7, 5."""
    lengths = [q.shape[1] for q, _, _ in prompts]
    schedule = [tuple(min(CHUNK, max(n - first, 0)) for n in lengths) for first in range(0, max(lengths), CHUNK)]
    assert [counts[lengths.index(19)] for counts in schedule] == [7, 7, 5]
    return fed(prompts, schedule, TORCH, DTYPE, page_size, wrong)


RIGHT_WAYS: dict[str, Way] = {
    "alone": alone,
    "packed": packed,
    "padded right": partial(padded, left=False),
    "padded left": partial(padded, left=True),
    "chunks": partial(in_chunks, page_size=None),
    "chunks in pages": partial(in_chunks, page_size=16),
}
WRONG_WAYS: dict[str, Way] = {
    "zeros for a mask": partial(padded, left=True, masked=False),
    "lengths one too small": partial(in_chunks, page_size=None, wrong=1),
    "each other's keys": lambda prompts: alone([(q, np.roll(k, 1, axis=0), v) for q, k, v in prompts]),
}


@pytest.fixture(scope="module", params=[REFERENCE, SM_80], ids=["reference", "emulator"])
def expected(request: pytest.FixtureRequest) -> Any:
    """Each prompt alone, on the backend that stays active."""
    with cuattn.use_backend(*request.param):
        yield alone(PROMPTS)


def check(way: Way, order: tuple[int, ...], expected: list[Both]) -> None:
    for s, result in zip(order, way([PROMPTS[s] for s in order]), strict=True):
        assert_both_equal(result, expected[s], DTYPE, f"prompt {s}")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", RIGHT_WAYS)
def test_same_bits(expected: list[Both], name: str, order: tuple[int, ...]) -> None:
    check(RIGHT_WAYS[name], order, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", WRONG_WAYS)
def test_controls(expected: list[Both], name: str, order: tuple[int, ...]) -> None:
    with pytest.raises(BitwiseMismatch):
        check(WRONG_WAYS[name], order, expected)
