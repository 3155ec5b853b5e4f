"""Small emulated problems in which a change of a kernel shows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from problems import int32, qkv, tensor
from small_kernels import TARGET, cache, random_mask, scan

import cuattn
from cuattn import emulator
from cuattn.backward import plan_backward
from cuattn.checks import check_attention, check_upstream
from cuattn.interop import Tensor, import_tensor
from cuattn.problem import PACKED, Gradients, Problem, Sequences
from cuattn.schedule import plan_forward
from cuattn.testing.arrays import Bits, poison

Both = tuple[Bits, Bits]


@dataclass(frozen=True)
class ManyRows:
    """One head's attention of seeded random bf16 tensors, and who computes it."""

    len_q: int = 72
    len_k: int = 300
    head_dim: int = 64
    mask: str = "full"
    arch: str = "sm_80"
    infinite: bool = False  # a value that the first three causal rows do not see is infinite
    row_stride: int = 1  # rows of the output are this many rows apart

    def inputs(self) -> list[torch.Tensor]:
        random = torch.Generator().manual_seed(self.len_q + self.len_k)
        lengths = (self.len_q, self.len_k, self.len_k)
        q, k, v = (torch.randn(1, 1, n, self.head_dim, generator=random).to(torch.bfloat16) for n in lengths)
        if self.infinite:
            v[:, :, self.len_k - self.len_q + 3] = torch.inf
        return [q, k, v]

    def run(self, schedule: str = "ascending", seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, lse) of the emulated kernel, its fibers run in that order."""
        tensors = self.inputs()
        problem = check_attention(*tensors, self.mask, None, None, "bhsd", None)
        spread = torch.full((1, 1, self.len_q, self.row_stride, self.head_dim), torch.nan, dtype=torch.bfloat16)
        out, lse = spread[:, :, :, 0], torch.full((1, 1, self.len_q), torch.nan)
        outputs = {"out": import_tensor(out, "out"), "lse": import_tensor(lse, "lse")}
        launches = plan_forward(problem, **outputs, target=replace(TARGET, arch=self.arch), allocate=allocate)
        emulator.run(launches, schedule, seed)
        return out.contiguous(), lse


@dataclass(frozen=True)
class FewRows:
    """Attention with four query heads and two key heads, whose chunks are spread over blocks.

    starts: cumulative lengths of packed queries over a cache of len_k keys each. page_size: the cache is in pages;
    wrong_page: the last of a table that nobody checks does not exist. padded: some keys do not exist.
    """

    len_q: int = 2
    len_k: int = 1200
    batch: int = 1
    mask: str = "causal"
    dtype: str = "float16"
    value_dim: int = 64
    starts: Sequence[int] | None = None
    page_size: int | None = None
    wrong_page: bool = False
    padded: bool = False

    def run(self, schedule: str = "ascending", seed: int = 1) -> Both:
        """Bits of the output and of the LSE, computed by fibers in that order."""
        q, k, v = qkv(self.batch, self.len_q, self.len_k, self.dtype, 64, self.value_dim)
        options: dict[str, Any] = {"layout": "bhsd"}
        lengths = int32([self.len_k] * self.batch)
        if self.starts:
            q = q[:1].repeat(-(-self.starts[-1] // self.len_q), axis=2)[:, :, : self.starts[-1]]
            sequences = Sequences(self.batch, query_starts=int32(self.starts), key_lengths=lengths, cached=True)
            options = {"layout": PACKED, "sequences": sequences}
        if self.page_size:
            k, v = (in_pages(x, self.page_size) for x in (k, v))
            table = np.arange(len(k)).reshape(self.batch, -1)
            table[-1, -1] += 3 * self.wrong_page
            sequences = Sequences(self.batch, key_lengths=lengths, cached=True, block_table=int32(table))
            options["sequences"] = sequences
        if self.padded:
            options["key_padding_mask"] = import_tensor(random_mask(self.len_k, self.batch), "mask")
        problem = Problem(*(tensor(x, self.dtype) for x in (q, k, v)), self.mask, 0.125, **options)
        out, lse = poison((*q.shape[:3], self.value_dim), q.itemsize), poison(q.shape[:3], 4)
        outputs = tensor(out, self.dtype), tensor(lse, "float32")
        emulator.run(plan_forward(problem, *outputs, TARGET, allocate), schedule, seed)
        return out, lse


@dataclass(frozen=True)
class Backward:
    """Gradients of two query heads that share a key head; some keys do not exist, some rows do not contribute."""

    len_q: int = 100
    len_k: int = 150
    head_dim: int = 64
    dtype: str = "float16"
    arch: str = "sm_80"

    def run(self, schedule: str = "ascending", seed: int = 1) -> tuple[Bits, Bits, Bits]:
        """Bits of the gradients of keys, values and queries."""
        q, k, v = (
            x[:, :heads]
            for x, heads in zip(qkv(1, self.len_q, self.len_k, self.dtype, self.head_dim), (2, 1, 1), strict=True)
        )
        padding = random_mask(self.len_k, 1)
        arrays = [x.view(self.dtype) for x in (q, k, v)]
        out, lse = cuattn.attention(*arrays, "causal", key_padding_mask=padding, return_lse=True)
        dout = np.roll(out, 1, axis=2)
        dout[:, :, 30:47] = 0
        problem = check_attention(*arrays, "causal", None, padding, "bhsd", None)
        dlse = np.where((dout == 0).all(axis=3), np.float32(0), np.cos(lse))
        gradients = [poison(x.shape, x.itemsize) for x in (q, k, v)]
        launches = plan_backward(
            problem,
            check_upstream(problem, dout, out, lse, dlse),
            Gradients(*(tensor(x, self.dtype) for x in gradients)),
            replace(TARGET, arch=self.arch),
            allocate,
        )
        emulator.run(launches, schedule, seed)
        return gradients[1], gradients[2], gradients[0]


def in_pages(bits: Bits, page_size: int) -> Bits:
    """(batch, head, token, column) as (page, head, token of the page, column)."""
    batch, heads, tokens, columns = bits.shape
    pages = bits.reshape(batch, heads, tokens // page_size, page_size, columns).swapaxes(1, 2)
    return np.ascontiguousarray(pages.reshape(-1, heads, page_size, columns))


def allocate(shape: tuple[int, ...], dtype: str) -> Tensor:
    return import_tensor(np.empty(shape, dtype), "workspace")


class Appending:
    """New keys and values in pages of a cache and beyond its capacity."""

    def run(self, schedule: str = "ascending", seed: int = 1) -> None:
        cache([3, 46, 94], 4, capacity=96, page_size=16).append(schedule, seed)


class Scanning:
    """A mask of several of the block's tiles."""

    def run(self, schedule: str = "ascending", seed: int = 1) -> Both:
        return scan(random_mask(9000, batch=1), schedule, seed)
