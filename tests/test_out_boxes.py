"""Rows that the Hopper kernel stores by the copy engine, emulated: bits of the portable kernels, and planted bugs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import SM_90A
from changed import assert_found
from hopper_calls import Bug, arrays, assert_same, both_families, configs_of, in_order
from hopper_code import wrong_with
from planted_problems import ManyRows
from sass import Program

import cuattn
from cuattn import emulator, jit
from cuattn.config import MASKS, ForwardSm90Config, attention_configs
from cuattn.launches import Launch

#: Shared memory has room for rows of these (head_dim, value_dim).
DIMS = ((64, 64), (72, 72), (96, 96), (128, 128), (192, 128), (24, 40), (128, 192), (128, 136), (256, 64))


def stored(launched: list[Launch]) -> list[bool]:
    """Of the launches so far, whether their rows leave as boxes."""
    return [config.out_boxes for config in configs_of(launched) if isinstance(config, ForwardSm90Config)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dims", DIMS)
def test_the_bits_of_the_portable_kernels(dims: tuple[int, int], mask: str, launched: list[Launch]) -> None:
    """Tiles that end inside of a sequence, and inside of a box; of one chunk and of several."""
    for batch, rows, keys in ((2, 149, 149), (1, 70, 700)):
        tensors = arrays(batch, rows, keys, heads=(4, 2), dims=dims)
        assert_same(*both_families(*tensors, mask=mask, num_splits=1))
    assert stored(launched) == [True, True]


@pytest.mark.parametrize(("group", "box"), [(1, (16, 1)), (2, (8, 2)), (4, (4, 4)), (8, (2, 8)), (16, (1, 16))])
def test_groups_that_make_boxes(group: int, box: tuple[int, int], launched: list[Launch]) -> None:
    for layout in ("bhsd", "bshd"):
        tensors = arrays(2, 70, 90, heads=(2 * group, 2), dtype="float16")
        tensors = [x.transpose(1, 2).contiguous() if layout == "bshd" else x for x in tensors]
        assert_same(*both_families(*tensors, mask="causal", layout=layout, num_splits=1))
    maps = [one.tensor_maps["out_map"] for one in launched if one.tensor_maps]
    assert [(x.rows, x.heads) for x in maps] == [box, box]


def test_rows_that_are_no_boxes(launched: list[Launch]) -> None:
    """Groups that do not divide a warp's rows; sequences of several lengths; blocks that share rows; no room."""
    assert_same(*both_families(*arrays(1, 150, 150, heads=(3, 1)), num_splits=1))
    lengths = torch.tensor([100, 150], dtype=torch.int32)
    assert_same(*both_families(*arrays(2, 150, 150), kv_lengths=lengths, num_splits=1))
    assert_same(*both_families(*arrays(1, 150, 1500), num_splits=2))
    assert_same(*both_families(*arrays(1, 150, 150, dims=(256, 256)), num_splits=1))
    assert stored(launched) == [False] * 4


def test_without_lse(launched: list[Launch]) -> None:
    tensors = arrays(1, 100, 100)
    with cuattn.use_backend(*SM_90A):
        assert_same([cuattn.attention(*tensors)], cuattn.attention(*tensors, return_lse=True)[:1])
    assert stored(launched) == [True, True]


@pytest.mark.parametrize("row_stride", [1, 3])
def test_every_order_of_threads_and_copies(row_stride: int, launched: list[Launch]) -> None:
    """Rows apart from each other, too, between which nothing is written."""
    problem = ManyRows(len_q=150, len_k=700, head_dim=128, mask="causal", arch="sm_90a", row_stride=row_stride)
    expected = replace(problem, arch="sm_90").run()
    for schedule in emulator.SCHEDULES:
        for seed in range(1, 4 if schedule == "random" else 2):
            assert_same(problem.run(schedule, seed), expected)
    assert stored(launched) == [True] * 5


def test_they_are_compiled_ahead() -> None:
    names = [[config.name for config in attention_configs(dim, "full", "bfloat16", "sm_90a")] for dim in (128, 256)]
    assert [sum("boxes" in name for name in each) for each in names] == [1, 0]


@pytest.mark.parametrize("dims", DIMS)
def test_their_code(dims: tuple[int, int]) -> None:
    for mask in MASKS:
        config = ForwardSm90Config(*dims, mask, "bfloat16", "sm_90a", out_boxes=True)
        assert wrong_with(config) == [], config
        for instruction, number in (("UTMASTG", -(-dims[1] // 64)), ("STSM", -(-dims[1] // 16))):
            assert len(Program.of(jit.cubin_path(config)).find(rf"^{instruction}\b")) == number, config
    assert not Program.of(jit.cubin_path(replace(config, out_boxes=False))).find("^(UTMASTG|STSM)")


@dataclass(frozen=True)
class Heads:
    """Two query heads for each of two key heads."""

    def run(self, schedule: str = "ascending", seed: int = 1) -> Any:
        tensors = arrays(2, 90, 90, heads=(4, 2), dims=(128, 128))
        with cuattn.use_backend(*SM_90A):
            return in_order(lambda: cuattn.attention(*tensors, return_lse=True, num_splits=1), schedule, seed)


@dataclass(frozen=True)
class LseFirst(ManyRows):
    """The LSE stands where others have the output."""

    def run(self, schedule: str = "ascending", seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().run(schedule, seed)
        return lse, out


KERNEL, BOXES = "forward_sm90.cuh", "attn/out_boxes.cuh"
SETTLES = "multiply_keys();\n            settle();\n"
UNSETTLED = "a store from there has not been waited for|race with a read"
#: Some of the first tile's rows do not exist.
NO_FIRST_ROWS = ManyRows(len_q=150, len_k=700, head_dim=128, mask="causal", arch="sm_90a")
#: More tiles of rows than an emulated device has multiprocessors.
MANY_TILES = ManyRows(len_q=900, len_k=100, head_dim=128, arch="sm_90a")
BUGS = {
    "rows are hidden from the copy engine": Bug(BOXES, "        ptx::fence_async_proxy();\n", "", "asynchronous proxy"),
    "rows are stored before all lanes have written them": Bug(
        BOXES, "ptx::fence_async_proxy();\n        __syncwarp();", "ptx::fence_async_proxy();", "race|never written"
    ),
    "rows are written over those on their way": Bug(KERNEL, SETTLES, "multiply_keys();\n", UNSETTLED, MANY_TILES),
    "chunks are written over rows on their way": Bug(
        KERNEL, SETTLES, "multiply_keys();\n", UNSETTLED, replace(MANY_TILES, len_k=700)
    ),
    "rows are written over chunks": Bug(BOXES, "        __syncwarp();  // all lanes have read", "        //", "race"),
    "rows without keys are written over those on their way": Bug(
        KERNEL,
        "settle();\n            release_queries",
        "release_queries",
        UNSETTLED,
        replace(MANY_TILES, mask="causal"),
    ),
    "a warp ends before its rows are stored": Bug(
        KERNEL, "        Consumer::settle();\n", "", "returns without tma_store_wait"
    ),
    "rows before the first one are stored": Bug(
        BOXES, "lane == 0 && first_row >= 0", "lane == 0", "negative coordinate", NO_FIRST_ROWS
    ),
    "a box starts before the first row": Bug(
        "attn/block_work.cuh", "missing / first_row_unit * first_row_unit", "missing", "not written", NO_FIRST_ROWS
    ),
    "columns of another panel": Bug(BOXES, "room + panel * panel_bytes", "room", None),
    "tokens and heads change places": Bug(BOXES, "head * (rows >> shift) + token", "row", None, Heads()),
    "statistics of other rows": Bug(
        BOXES, "(lane & 7) * 4", "(lane & 3) * 4", None, LseFirst(len_q=150, len_k=300, arch="sm_90a")
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str, sources: Path) -> None:
    assert_found(BUGS[name], sources)
