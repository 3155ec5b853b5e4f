"""The kernel for few rows on Hopper, emulated: it has the bits of the portable kernels, in any order of its threads,
blocks and copies, and the emulator finds what is wrong in a changed one.

On sm_90 the portable kernels run, with the tensor cores of sm_90a.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from backends import SM_90A
from changed import assert_found
from hopper_calls import SM_90, TORCH, in_order
from problems import normal

import cuattn
from cuattn import dispatch, emulator
from cuattn.config import CombineConfig, DecodeConfig
from cuattn.errors import EmulatorError
from cuattn.launches import Launch
from cuattn.testing import assert_bitwise_equal


@dataclass(frozen=True)
class Decode:
    """A call with few rows; with ``lengths`` of the cache's sequences, else over all keys."""

    rows: int = 1
    heads: tuple[int, int] = (4, 1)
    dims: tuple[int, int] = (128, 128)
    keys: int = 700
    batch: int = 1
    mask: str = "causal"
    dtype: str = "bfloat16"
    scale: float | None = None
    num_splits: int | None = None
    lengths: tuple[int, ...] | None = None
    page_size: int | None = None  # the cache is in pages, in a mixed order

    def tensors(self) -> list[torch.Tensor]:
        shapes = ((self.batch, self.heads[0], self.rows, self.dims[0]),)
        shapes += tuple((self.batch, self.heads[1], self.keys, dim) for dim in self.dims)
        return [TORCH.array(normal(one, self.dtype, 7 * i + self.keys), self.dtype) for i, one in enumerate(shapes)]

    def on(self, backend: tuple[str, str]) -> Any:
        q, k, v = self.tensors()
        options = {"scale": self.scale, "num_splits": self.num_splits, "return_lse": True}
        with cuattn.use_backend(*backend):
            if self.lengths is None:
                return cuattn.attention(q, k, v, self.mask, **options)
            for x, n in ((x, n) for x in (k, v) for n in enumerate(self.lengths)):
                x[n[0], :, n[1] :] = torch.nan
            lengths = torch.tensor(self.lengths, dtype=torch.int32)
            if self.page_size is None:
                return cuattn.attention_kvcache(q, k, v, lengths, mask=self.mask, layout="bhsd", **options)
            pages = self.keys // self.page_size
            order = torch.randperm(self.batch * pages, generator=torch.Generator().manual_seed(3))
            k, v = (self._in_pages(x, order) for x in (k, v))
            table = torch.argsort(order).view(self.batch, pages).int()
            options |= {"layout": "bshd", "block_table": table}
            out, lse = cuattn.attention_kvcache(q.transpose(1, 2), k, v, lengths, mask=self.mask, **options)
            return out.transpose(1, 2).contiguous(), lse

    def _in_pages(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """(page, token, head, column): page number order[i] of the sequences' pages is at place i."""
        shape = (self.batch, x.shape[1], self.keys // self.page_size, self.page_size, x.shape[3])
        return x.reshape(shape).permute(0, 2, 3, 1, 4).flatten(0, 1)[order].contiguous()

    def run(self, schedule: str = "ascending", seed: int = 1) -> Any:
        """On the emulated Hopper GPU, in that order of threads."""
        return in_order(lambda: self.on(SM_90A), schedule, seed)


CASES = {
    "one row": Decode(),
    "one row, full": Decode(mask="full", heads=(2, 2), keys=130),
    "8 rows": Decode(rows=2, heads=(8, 2), batch=2, num_splits=1),
    "12 rows": Decode(rows=3, keys=1200),
    "16 rows, D 64": Decode(rows=4, dims=(64, 64), dtype="float16"),
    "D 72": Decode(dims=(72, 72), keys=520),
    "D 40 and 104": Decode(dims=(40, 104), keys=520),
    "D 192 and 128": Decode(rows=2, dims=(192, 128), keys=600),
    "D 192": Decode(dims=(192, 192), keys=600, dtype="float16"),
    "D 256": Decode(rows=2, dims=(256, 256), keys=600, mask="full"),
    "D 8": Decode(dims=(8, 8), keys=260),
    "a negative scale": Decode(scale=-0.3),
    "peaked": Decode(scale=40.0, dtype="float16"),
    "more rows than keys": Decode(rows=4, heads=(2, 1), keys=3),
    "3 splits": Decode(keys=2300, num_splits=3),
    "9 splits": Decode(keys=5000, heads=(1, 1), num_splits=9, dims=(16, 16)),
    "lengths": Decode(batch=3, keys=1100, lengths=(1100, 0, 513)),
    "one length": Decode(keys=2300, lengths=(1700,)),
    "a length of 0": Decode(keys=1300, lengths=(0,)),
    "pages of 8": Decode(keys=400, lengths=(390,), page_size=8),
    "pages of 16": Decode(batch=2, heads=(4, 2), keys=1120, lengths=(1100, 600), page_size=16, rows=2),
    "pages of 40, D 192": Decode(batch=2, keys=600, lengths=(593, 600), page_size=40, dims=(192, 192)),
    "pages of 256": Decode(keys=1024, lengths=(1001,), page_size=256, num_splits=2, dims=(64, 64)),
    "pages of 16, a cluster": Decode(keys=2304, lengths=(2290,), page_size=16, num_splits=2),
    "lengths, 16 rows": Decode(rows=4, batch=2, keys=1300, lengths=(1299, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_the_portable_kernels(name: str, launched: list[Launch]) -> None:
    expected = CASES[name].on(SM_90)
    assert not any(isinstance(one.config, DecodeConfig) for one in launched)
    for one, other in zip(CASES[name].on(SM_90A), expected, strict=True):
        assert_bitwise_equal(one, other)
    assert any(isinstance(one.config, DecodeConfig) for one in launched)


@pytest.mark.parametrize("first", range(8, 257, 32))
def test_every_head_dim(first: int) -> None:
    for head_dim in range(first, first + 32, 8):
        case = Decode(dims=(head_dim, head_dim), keys=140, dtype="bfloat16" if head_dim % 16 else "float16")
        for one, other in zip(case.on(SM_90A), case.on(SM_90), strict=True):
            assert_bitwise_equal(one, other)


@pytest.mark.parametrize("case", [Decode(keys=2300, num_splits=3), Decode(batch=3, keys=1100, lengths=(900, 40, 513))])
def test_every_order_of_threads_and_copies(case: Decode) -> None:
    expected = case.run()
    for schedule, seed in (("descending", 1), ("random", 1), ("random", 2)):
        for one, other in zip(case.run(schedule, seed), expected, strict=True):
            assert_bitwise_equal(one, other)


class TestClusters:
    """A cluster has a group's chunks where there is one sequence, or all have the same length."""

    def clusters(self, case: Decode, launched: list[Launch]) -> list[int]:
        case.run()
        return [one.cluster for one in launched]

    def test_one_sequence(self, launched: list[Launch]) -> None:
        assert self.clusters(Decode(keys=1300, lengths=(1250,), num_splits=3), launched) == [3]

    def test_equal_lengths(self, launched: list[Launch]) -> None:
        assert self.clusters(Decode(batch=2, keys=1300, num_splits=2), launched) == [2]

    def test_other_lengths_are_merged_by_a_launch(self, launched: list[Launch]) -> None:
        assert self.clusters(Decode(batch=2, keys=1300, lengths=(1250, 7), num_splits=2), launched) == [1, 1]
        assert isinstance(launched[1].config, CombineConfig)

    def test_more_pieces_than_a_cluster_has_blocks(self, launched: list[Launch]) -> None:
        case = Decode(keys=8000, dims=(16, 16), heads=(1, 1))
        assert self.clusters(replace(case, num_splits=8), launched) == [8]
        assert self.clusters(replace(case, num_splits=9), launched)[1:] == [1, 1]

    def test_the_control(self) -> None:
        """A grid must be cut into whole clusters."""
        whole, case = emulator.run, Decode(keys=1300, num_splits=2)
        try:
            dispatch.emulator.run = lambda launches: whole([replace(one, cluster=3) for one in launches])
            with pytest.raises(EmulatorError, match="no multiple of its clusters"):
                case.on(SM_90A)
        finally:
            dispatch.emulator.run = whole


def test_rows_that_the_copy_engine_cannot_describe(launched: list[Launch]) -> None:
    """The portable kernel reads them."""
    q, k, v = Decode(batch=2).tensors()
    k = k[:1].expand(k.shape)  # all sequences have the same one
    results = []
    for backend in (SM_90, SM_90A):
        with cuattn.use_backend(*backend):
            results.append(cuattn.attention(q, k, v))
    assert_bitwise_equal(*results)
    assert not any(isinstance(one.config, DecodeConfig) for one in launched)


class Bug(NamedTuple):
    file: str
    old: str
    new: str
    error: str | None
    problem: Any = Decode(keys=1300, num_splits=1)


KERNEL, BLOCK = "decode_sm90.cuh", "attn/decode_block.cuh"
WEIGHTS, OUTPUTS, SUMS = (f"attn/decode_{name}.cuh" for name in ("weights", "outputs", "sums"))
CLUSTER = Decode(keys=1300, num_splits=3)
PAGED = Decode(keys=400, lengths=(390,), page_size=16)
UNORDERED = "race|under way|never written|has not been waited for|asynchronous proxy"
BUGS = {
    "keys are used before they are there": Bug(
        BLOCK,
        "        ptx::mbarrier_wait(ring_.filled + place_.slot * ptx::mbarrier_bytes, place_.parity);\n",
        "",
        UNORDERED,
    ),
    "a slot is given back too early": Bug(
        WEIGHTS,
        "                multiply_keys(keys_.take(), scores);\n                keys_.leave(lane_);",
        "                const u32 slot = keys_.take();\n                keys_.leave(lane_);\n"
        "                multiply_keys(slot, scores);",
        UNORDERED,
    ),
    "a slot is never given back": Bug(OUTPUTS, "        values_.leave(lane_);\n", "", "deadlock"),
    "scores are read before all are there": Bug(
        WEIGHTS,
        "                ptx::barrier_sync<score_warps * 32>(scores_known);  // all scores are there\n",
        "",
        UNORDERED,
    ),
    "weights are read before they are there": Bug(
        WEIGHTS, "                weights_.meet();\n", "", f"{UNORDERED}|barrier|deadlock"
    ),
    "the same weights are used again": Bug(OUTPUTS, "        weights_.next();\n", "", UNORDERED),
    "weights are overwritten while others read them": Bug(BLOCK, "slot_ ^= 1;", "", UNORDERED),
    "outputs are normalised before it is known how": Bug(
        OUTPUTS,
        "        meet();  // how to normalise the outputs\n        if (is_whole(work)) store(work);",
        "        if (is_whole(work)) store(work);\n        meet();",
        UNORDERED,
    ),
    "partial results are merged before all are there": Bug(
        KERNEL, "    ptx::meet_cluster();\n", "", "another block|not been written", CLUSTER
    ),
    "some threads do not meet the cluster": Bug(
        KERNEL,
        "if (params.pieces > 1) merge_pieces",
        "if (params.pieces > 1 && threadIdx.x >= 32) merge_pieces",
        "deadlock",
        CLUSTER,
    ),
    "a row of a cluster is left out": Bug(
        KERNEL,
        "ptx::cluster_rank() + params.pieces *",
        "ptx::cluster_rank() + 1 + params.pieces *",
        "were not written",
        CLUSTER,
    ),
    "chunks are merged twice": Bug(
        "attn/work.cuh",
        "work.folded = shape.first_chunk_from(start(1));",
        "work.folded = 1;",
        "has not been written",
        Decode(keys=2300, num_splits=2),
    ),
    "lengths are read before earlier launches have ended": Bug(
        "attn/block_work.cuh",
        "            if (!rehearses) ptx::wait_for_earlier_launches();\n",
        "",
        "before the wait for earlier launches",
        Decode(keys=1300, lengths=(700,)),
    ),
    "a rehearsal reads lengths": Bug(
        "attn/groups.cuh",
        "return rehearses || !entries ?",
        "return !entries ?",
        "before the wait for earlier launches",
        Decode(keys=1300, lengths=(700,)),
    ),
    "sums forget to be rescaled": Bug(SUMS, "sum = __fmul_rn(sum, load_number(weights.rescale[row]));", "", None),
    "a box of another page": Bug("attn/key_copies.cuh", "batch = page_;", "batch = next_page_;", None, PAGED),
    "keys beyond a row's are seen": Bug(WEIGHTS, "if (first + i >= visible)", "if (first + i > visible)", None),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str, sources: Path) -> None:
    assert_found(BUGS[name], sources)
