"""Keys spread over processes that talk by gloo: the bits of one process, for any number of them."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from context_parallel_cases import CASES, Case

import cuattn
from cuattn.integrations import context_parallel
from cuattn.integrations.context_parallel import shard_bounds
from cuattn.testing import assert_bitwise_equal

SIZES = (1, 2, 4)
every_case = pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.shift])


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What each process of each group computed, by the group's size, rank and case."""
    folder = tmp_path_factory.mktemp("groups")
    script = Path(__file__).with_name("context_parallel_ranks.py")
    command = [sys.executable, str(script), str(folder), *map(str, SIZES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in SIZES}


@pytest.fixture(params=SIZES, ids=lambda size: f"{size} ranks")
def ranks(request: pytest.FixtureRequest, groups: dict[int, Any]) -> list[dict[str, Any]]:
    return groups[request.param]


def alone(case: Case) -> Any:
    return cuattn.attention(*case.inputs(), case.mask, scale=case.scale, layout=case.layout, return_lse=True)


@every_case
def test_any_number_of_ranks_has_the_bits_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    expected = alone(CASES[name])
    for results in ranks:
        for got, want in zip(results[name], expected, strict=True):
            assert got.is_contiguous()
            assert_bitwise_equal(got, want)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.shift])
def test_cuts_inside_of_a_chunk_are_refused_on_every_rank(ranks: list[dict[str, Any]], name: str) -> None:
    messages = {results[name] if isinstance(results[name], str) else None for results in ranks}
    if len(ranks) == 1:
        assert messages == {None}
    else:
        (message,) = messages
        assert "expected the start of a chunk (cuattn.chunk_starts)" in message
        assert message.startswith(f"bounds[0]: got keys up to {CASES[name].cuts(len(ranks))[0][1]} of 2300")


def test_cuts_inside_of_a_chunk_would_have_other_bits() -> None:
    """The control: the same merge over chunks that start elsewhere is found out."""
    q, k, v = CASES["full"].inputs()
    parts = [
        cuattn.attention_partials(q, k[:, :, places], v[:, :, places]) for places in (slice(500), slice(500, None))
    ]
    out = cuattn.combine(parts, dtype=q.dtype)
    torch.testing.assert_close(out, cuattn.attention(q, k, v), atol=1e-5, rtol=1e-5)
    with pytest.raises(cuattn.testing.BitwiseMismatch):
        assert_bitwise_equal(out, cuattn.attention(q, k, v))


@pytest.mark.parametrize("size", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("keys", [0, 1, 512, 513, 5000, 16384, 100_000])
def test_shard_bounds(keys: int, size: int) -> None:
    bounds = shard_bounds(keys, size)
    assert len(bounds) == size
    assert bounds[0][0] == 0
    assert bounds[-1][1] == keys
    assert all(first <= end for first, end in bounds)
    assert all(left[1] == right[0] for left, right in pairwise(bounds))
    assert {end for _, end in bounds} <= {*cuattn.chunk_starts(keys), keys}
    largest = 4096 if keys > 65536 else 2048
    assert max(end - first for first, end in bounds) <= keys / size + largest


def test_two_ranks_share_evenly() -> None:
    assert shard_bounds(8192, 2) == [(0, 4096), (4096, 8192)]
    assert shard_bounds(1500, 4) == [(0, 512), (512, 512), (512, 1024), (1024, 1500)]


@pytest.mark.parametrize(("keys", "size"), [(-1, 1), (5, 0), (5.0, 1), (5, "2")])
def test_shard_bounds_refuses(keys: Any, size: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        shard_bounds(keys, size)


def test_gradients_are_refused() -> None:
    q = torch.zeros(1, 1, 2, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="gradients are not supported"):
        context_parallel.attention(q, q, q)
