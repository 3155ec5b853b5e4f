"""The kernel for Hopper, emulated: it has the bits of the portable kernels, in any order of its threads and copies, and
the emulator finds what is wrong in a changed one.

On sm_90 the portable kernels run, with the tensor cores of sm_90a.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backends import SM_80, SM_90A, attention_on
from changed import assert_found
from hopper_calls import SM_90, TORCH, Bug, arrays, assert_same, both_families, configs_of, in_order
from planted_problems import ManyRows
from surface import ASKED, Surface, arranged, covering

import cuattn
from cuattn import emulator, testing
from cuattn.attend import SMALLEST_BOX
from cuattn.config import ForwardSm90Config
from cuattn.launches import Launch
from cuattn.schedule import FEW_ROWS
from cuattn.testing import BitwiseMismatch, assert_bitwise_equal

#: Keys of the sequences, by the rows of the longest.
KEYS = {1: (1100, 0, 513, 77), 5: (640, 4, 0, 130), 129: (700, 0, 130), 257: (520, 3, 258)}
KERNELS = (
    ("bfloat16", (64, 64), "causal"),
    ("float16", (128, 128), "full"),
    ("bfloat16", (96, 96), "causal"),
    ("float16", (192, 128), "causal"),
    ("bfloat16", (256, 256), "full"),
    ("float16", (40, 72), "causal"),
)


def bits_on(backend: tuple[str, str | None], case: Surface) -> list[Any]:
    with cuattn.use_backend(*backend):
        return case.run(TORCH)[0]


def sample() -> Iterator[Surface]:
    asked = {**ASKED, "rows": tuple(KEYS), "num_splits": (None, 3), "kernel": KERNELS, "heads": ((2, 1), (3, 3))}
    for levels in covering(asked):
        dtype, dims, mask = levels.pop("kernel")
        yield arranged(**levels, lengths=KEYS, dtype=dtype, dims=dims, mask=mask)


@pytest.mark.parametrize("case", list(sample()), ids=str)
def test_the_bits_of_the_portable_kernels(case: Surface, launched: list[Launch]) -> None:
    expected = bits_on(SM_90, case)
    assert configs_of(launched) == []
    case.assert_same(bits_on(SM_90A, case), expected)
    rows = max(case.rows) * case.heads[0] // case.heads[1]
    paged = case.way.startswith(("cache", "append")) and case.page_size is not None
    boxes = not case.way.startswith("mask") and (not paged or math.gcd(case.page_size, 64) >= SMALLEST_BOX)
    small = max(case.dims) <= 128
    hopper = boxes and (rows <= (16 if small else 8) or (small and not paged))
    portable = rows <= FEW_ROWS and not case.way.startswith("packed") and not hopper
    assert bool(configs_of(launched)) != portable, "the kernel for Hopper ran"


def test_control_of_the_comparison() -> None:
    """Another generation's tensor cores add in another order, and the same comparison finds that out."""
    tensors, results = arrays(1, 70, 300, dims=(128, 128), dtype="float16"), []
    for backend in (SM_80, SM_90):
        with cuattn.use_backend(*backend):
            results.append(cuattn.attention(*tensors, return_lse=True))
    with pytest.raises(BitwiseMismatch):
        assert_same(*results)


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(head_dim: int) -> None:
    dtype, mask = ("bfloat16", "causal") if head_dim % 16 else ("float16", "full")
    assert_same(*both_families(*arrays(1, 70, 150, dims=(head_dim, head_dim), dtype=dtype), mask=mask))


@pytest.mark.parametrize(("heads", "batch"), [((4, 1), 1), ((8, 2), 3)])
def test_few_rows(heads: tuple[int, int], batch: int, launched: list[Launch]) -> None:
    """Blocks have ranges of chunks that end anywhere; fewer rows go to another kernel (test_decode.py)."""
    for head_dim in (64, 128):
        assert_same(*both_families(*arrays(batch, 5, 2700, heads=heads, dims=(head_dim, head_dim))))
    assert [getattr(config, "few", False) for config in configs_of(launched)] == [True, True]


@pytest.mark.parametrize("rows", [65, 300])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 192), (256, 256)])
def test_chunks(dims: tuple[int, int], rows: int, launched: list[Launch]) -> None:
    """Several chunks of a row: merged in shared memory or in a workspace, and by several blocks or one."""
    assert_same(*both_families(*arrays(1, rows, 2700, heads=(1, 1), dims=dims), mask="causal"))
    (config,) = configs_of(launched)
    assert config.split == (rows == 65)
    assert config.merged_in_shared == (dims[0] < 192)


def test_peaked_scores_and_other_scales() -> None:
    q, k, v = arrays(1, 90, 700)
    for scale in (8.0, -1.5, 0.0):
        assert_same(*both_families(q, k, v, scale=scale))


class TestStrides:
    """Whatever the strides are: no copy is made, and the bits are the same."""

    def strided(self, launched: list[Launch], k: torch.Tensor, v: torch.Tensor) -> ForwardSm90Config:
        q = arrays(2, 70, 300)[0]
        assert_same(*both_families(q, k.contiguous(), v.contiguous()))
        del launched[:]
        assert_same(*both_families(q, k, v))
        (config,) = configs_of(launched)
        inputs = next(one for one in launched if one.config is config).inputs
        assert {inputs[name].pointer for name in "kv"} == {k.data_ptr(), v.data_ptr()}
        return config

    def test_tokens_before_heads(self, launched: list[Launch]) -> None:
        _, k, v = arrays(2, 70, 300)
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        assert not self.strided(launched, k, v).paged

    def test_every_other_token(self, launched: list[Launch]) -> None:
        _, k, v = arrays(2, 70, 600)
        assert not self.strided(launched, k[:, :, ::2], v[:, :, ::2]).paged

    def test_one_sequence_for_all(self, launched: list[Launch]) -> None:
        """A distance of zero, which no map can have."""
        _, k, v = arrays(1, 70, 300)
        assert self.strided(launched, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)).paged


@pytest.mark.parametrize(("head_dim", "mask"), [(64, "causal"), (128, "full")])
def test_every_order_of_threads_and_copies(head_dim: int, mask: str) -> None:
    problem = ManyRows(len_q=150, len_k=700, head_dim=head_dim, mask=mask, arch="sm_90a")
    expected = replace(problem, arch="sm_90").run()
    for schedule in emulator.SCHEDULES:
        for seed in range(1, 4 if schedule == "random" else 2):
            assert_same(problem.run(schedule, seed), expected)


def test_the_sweep() -> None:
    """With more rows than those of test_invariance.py, which sweeps this kernel for few rows."""
    case = testing.Case(
        len_q=70, len_k=150, mask="causal", dtype="float16", head_dim=64, batch=2, heads=2, kv_heads=1, family="normal"
    )
    testing.assert_invariant(attention_on(SM_90A), [case])


KERNEL, COPIES, RING = "forward_sm90.cuh", "attn/key_copies.cuh", "attn/ring.cuh"
ROWS = "attn/key_row_copies.cuh"
#: What the emulator says of accesses that nothing orders.
UNORDERED = "race with a (read|write)|a copy to there has not been waited for|wgmma still reads|never written"


@dataclass(frozen=True)
class Asked:
    """A call for attention with key lengths, or with a mask, with holes or for the left; garbage where no key is."""

    holes: bool = False
    left: bool = False

    def run(self, schedule: str = "ascending", seed: int = 1) -> Any:
        dim = 128 if self.left else 64
        q, k, v = arrays(2, 70, 300, heads=(1, 1), dims=(dim, dim))
        keys = torch.arange(300)
        exists = keys % 7 != 3 if self.holes else keys >= 70 if self.left else keys < 200
        k[:, :, ~exists], v[:, :, ~exists] = torch.nan, torch.nan
        masked = {"key_padding_mask": exists.expand(2, -1)}
        options = masked if self.holes or self.left else {"kv_lengths": torch.tensor([200, 200])}
        options = {name: x.int() if name == "kv_lengths" else x for name, x in options.items()}
        with cuattn.use_backend(*SM_90A):
            return in_order(lambda: cuattn.attention(q, k, v, return_lse=True, **options), schedule, seed)


#: More tiles of rows than an emulated device has multiprocessors; queries in registers, or in shared memory alone.
MANY_TILES = ManyRows(len_q=900, len_k=900, head_dim=128, arch="sm_90a")
MANY_SHARED = ManyRows(len_q=1300, len_k=300, head_dim=64, arch="sm_90a")
BUGS = {
    "values are used before they are there": Bug(
        KERNEL,
        "            wait_filled();\n            multiply_values(adds);\n            pass_turn();",
        "            multiply_values(adds);\n            pass_turn();",
        UNORDERED,
    ),
    "a slot is given back too early": Bug(
        KERNEL,
        "            ptx::wgmma_wait<1>();\n            ptx::wgmma_hold(score_);\n            release(keys);",
        "            release(keys);\n            ptx::wgmma_wait<1>();\n            ptx::wgmma_hold(score_);",
        UNORDERED,
    ),
    "a slot is never given back": Bug(
        KERNEL,
        "            ptx::wgmma_hold(score_);\n            release(keys);",
        "ptx::wgmma_hold(score_);",
        "deadlock",
    ),
    "tiles are copied into slots in use": Bug(
        RING,
        "        ptx::mbarrier_wait(free + place.slot * ptx::mbarrier_bytes, place.parity ^ 1);\n",
        "",
        f"{UNORDERED}|more than 1 arrivals",
    ),
    "queries are hidden from the products": Bug(
        KERNEL,
        "        ptx::fence_async_proxy();\n        ptx::mbarrier_arrive(filled);",
        "        ptx::mbarrier_arrive(filled);",
        "asynchronous proxy",
        ManyRows(len_q=150, len_k=700, head_dim=64, arch="sm_90a"),
    ),
    "queries that consumers fetch are hidden from the products": Bug(
        KERNEL,
        "            ptx::fence_async_proxy();\n            meet();",
        "            meet();",
        "asynchronous proxy",
        Asked(holes=True),
    ),
    "the next queries come too early": Bug(
        KERNEL, "        ptx::mbarrier_wait(free, parity ^ 1);\n", "", UNORDERED, MANY_TILES
    ),
    "queries are given back too early": Bug(
        KERNEL,
        "            release(keys);\n            if (tile + 1 == end) release_queries(false);",
        "            release(keys);\n            if (tile + 2 == end) release_queries(false);",
        f"{UNORDERED}|deadlock",
        MANY_SHARED,
    ),
    "queries are given back before they are in registers": Bug(
        KERNEL,
        "#pragma unroll\n        for (int k = 0; k < held_queries",
        "release_queries(true);\n#pragma unroll\n        for (int k = 0; k < held_queries",
        f"{UNORDERED}|more than",
        MANY_TILES,
    ),
    "queries are given back before all lanes have them": Bug(
        KERNEL, "        __syncwarp();  // all lanes have them\n", "", UNORDERED, MANY_TILES
    ),
    "queries are never given back": Bug(KERNEL, "        release_queries(true);\n", "", "deadlock", MANY_TILES),
    "queries in shared memory are never given back": Bug(
        KERNEL, "if (tile + 1 == end) release_queries(false);", "", "deadlock", MANY_SHARED
    ),
    "a block leaves out its second tile": Bug(
        "attn/block_work.cuh", "item_of(++turn) <", "item_of(turn += 2) <", "were not written", MANY_TILES
    ),
    "products without their fence": Bug(
        KERNEL,
        "ptx::wgmma_fence();\n            multiply_keys();\n            settle",
        "multiply_keys();\n            settle",
        "wgmma_fence",
    ),
    "outputs are used before they are there": Bug(
        "attn/softmax_sm90.cuh",
        "ptx::wgmma_wait_after<0>",
        "ptx::wgmma_wait_after<1>",
        "before its wait|still under way|wait",
    ),
    "nobody has the first turn": Bug(KERNEL, "number == consumers - 1) pass_turn", "false) pass_turn", "deadlock"),
    "more registers than there are": Bug(
        KERNEL,
        "claim_registers<config::consumer_registers>",
        "claim_registers<config::consumer_registers + 8>",
        "register",
    ),
    "more bytes are expected than come": Bug(
        COPIES, "tile_rows * Tile::row_bytes);", "tile_rows * Tile::row_bytes + 16);", "deadlock"
    ),
    "the tail of the values is left as it is": Bug(COPIES, "            clear_rows(to, valid);\n", "", None, Asked()),
    "cleared rows are hidden from the products": Bug(
        COPIES,
        "                clear_rows(to, valid);\n                ptx::fence_async_proxy();",
        "                clear_rows(to, valid);",
        "asynchronous proxy",
        Asked(),
    ),
    "rows are announced too early": Bug(
        ROWS, "ptx::cp_async_wait<pending>();", "ptx::cp_async_wait<pending + 1>();", UNORDERED, Asked(holes=True)
    ),
    "keys in one piece are fetched from where there are none": Bug(
        COPIES, "(KeySequence::by_tables ? sequence_.first_place : 0)", "0", None, Asked(left=True)
    ),
    "fewer threads arrive at a slot than it waits for": Bug(
        COPIES,
        "            if (copiers > 1 && threadIdx.x > 0) ptx::mbarrier_arrive(filled);",
        "            if (copiers > 1 && threadIdx.x > 1) ptx::mbarrier_arrive(filled);",
        "deadlock",
        Asked(left=True),
    ),
    "a page of another tile": Bug(
        ROWS, "value_page_ = key_page_;\n        }", "value_page_ = next_page_;\n        }", None, Asked(holes=True)
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str, sources: Path) -> None:
    assert_found(BUGS[name], sources)


def test_infinite_values_stay_where_they_are_seen() -> None:
    """A row that does not see an infinite value is not changed by it, if the row that does is 64 rows behind it."""
    q, k, v = arrays(1, 256, 256, heads=(1, 1))
    with cuattn.use_backend(*SM_90A):
        expected = cuattn.attention(q, k, v, "causal")
        v[:, :, 200] = torch.inf
        out = cuattn.attention(q, k, v, "causal")
    assert_bitwise_equal(out[:, :, :128], expected[:, :, :128])
    assert not np.isfinite(out[:, :, 200:].float().numpy()).any()
