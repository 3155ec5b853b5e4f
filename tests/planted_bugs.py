"""Small emulated problems, and changes of the kernels that make them wrong."""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from small_kernels import TARGET, cache, random_mask, scan

from cuattn import emulator
from cuattn.checks import check_attention
from cuattn.interop import Tensor, import_tensor
from cuattn.schedule import plan_forward


@dataclass(frozen=True)
class Problem:
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
        launches = plan_forward(problem, **outputs, target=replace(TARGET, arch=self.arch), allocate=no_workspace)
        emulator.run(launches, schedule, seed)
        return out.contiguous(), lse


def no_workspace(shape: tuple[int, ...], dtype: str) -> Tensor:
    raise AssertionError(f"the kernel for many rows asks for {shape} of {dtype}")


class Appending:
    """New keys and values in pages of a cache and beyond its capacity."""

    def run(self, schedule: str = "ascending", seed: int = 1) -> None:
        cache([3, 46, 94], 4, capacity=96, page_size=16).append(schedule, seed)


class Scanning:
    """A mask of several of the block's tiles."""

    def run(self, schedule: str = "ascending", seed: int = 1) -> None:
        scan(random_mask(9000, batch=1), schedule, seed)


class Runnable(Protocol):
    def run(self, schedule: str = "ascending", seed: int = 1) -> object: ...


class Bug(NamedTuple):
    """One change of one file of the kernels, and a pattern of what the emulator says about it."""

    file: str
    old: str
    new: str
    error: str
    problem: Runnable = Problem()


FORWARD, EPILOGUE, SOFTMAX = "forward_sm80.cuh", "attn/epilogue.cuh", "attn/softmax.cuh"
APPEND, SCAN = "append_kv.cuh", "scan_mask.cuh"
STORE_ROW = "ptx::store_global_u32x4(row_out + row * stride + unit * 8,"
KERNEL_START = "SharedMemory& shared = *static_cast<SharedMemory*>(ptx::dynamic_shared());"
UNORDERED = "race with a (read|write) by thread|never written|a copy to there has not been waited for"
BUGS = {
    "no barrier in the main loop": Bug(FORWARD, "        __syncthreads();  // this step's tile", "//", UNORDERED),
    "no barrier among the lanes that load queries": Bug(
        FORWARD, "ptx::cp_async_wait<lookahead>();\n    __syncwarp();", "ptx::cp_async_wait<lookahead>();", UNORDERED
    ),
    "no barrier among the lanes that store rows": Bug(
        EPILOGUE,
        "    __syncwarp();\n#pragma unroll\n    for (int i = 0; i < 16 * units",
        "\n#pragma unroll\n    for (int i = 0; i < 16 * units",
        "shared (load|store) .* race with a (read|write) by thread",
    ),
    "no barrier among the lanes that share a row": Bug(
        "attn/chunks.cuh",
        "__syncwarp();  // the four lanes",
        "//",
        "shared (load|store) .* race with a (read|write) by thread",
        Problem(len_k=1200),
    ),
    "waits for too few copies": Bug(
        FORWARD, "cp_async_wait<lookahead - 1>", "cp_async_wait<lookahead>", "a copy to there has not been waited for"
    ),
    "loads into a tile in use": Bug(
        FORWARD, "load(block_step + lookahead);", "load(block_step + lookahead + 1);", UNORDERED
    ),
    "reads behind the last key": Bug(
        FORWARD,
        "key_length - first_key, thread",
        "key_length * 0 + key_tile, thread",
        r"cp\.async of 16 bytes .* outside of every tensor .*k \d+ of 38400",
    ),
    "reads behind the last query": Bug(
        FORWARD,
        "query_length - warp_row, lane",
        "query_length * 0 + 16, lane",
        r"cp\.async of 16 bytes .* outside of every tensor .*q \d+ of 9216",
    ),
    "writes behind shared memory": Bug(
        EPILOGUE, "store_shared_u32(scratch + ", "store_shared_u32(scratch + 0x40000 + ", "outside of shared memory"
    ),
    "writes before shared memory": Bug(
        EPILOGUE, "store_shared_u32(scratch + ", "store_shared_u32(scratch % 16 - 0x8000 + ", "outside of shared memory"
    ),
    "a shared object that is not there": Bug(
        FORWARD, "shared_address(shared.rows[warp])", "shared_address(shared.rows[99])", "not in shared memory"
    ),
    "a misaligned load": Bug(
        EPILOGUE,
        "load_shared_u32x4(scratch + ",
        "load_shared_u32x4(scratch + 4 + ",
        "shared load of 16 bytes .* misaligned",
    ),
    "a misaligned store": Bug(
        EPILOGUE, STORE_ROW, STORE_ROW.replace("* 8", "* 8 + 1"), "global store of 16 bytes .* misaligned"
    ),
    "a store to an input": Bug(
        FORWARD,
        "end.start_of(static_cast<u16*>(params.out),",
        "end.start_of(static_cast<u16*>(const_cast<void*>(params.query)),",
        "global store of 16 bytes .* q is an input",
    ),
    "a row that is not stored": Bug(
        EPILOGUE,
        STORE_ROW,
        f"if (row != 3) {STORE_ROW}",
        r"^out: 320 elements were not written, the first at \(0, 0, 3, 0\)",
    ),
    "a store between the rows": Bug(
        EPILOGUE,
        STORE_ROW,
        f"if (row == 3) ptx::store_global_u32x4(row_out + row * stride + 64 + unit * 8, uint4{{}});\n{STORE_ROW}",
        r"^out: 640 bytes between its elements were written",
        Problem(row_stride=2),
    ),
    "a collective without half of its lanes": Bug(
        SOFTMAX,
        "quad_sum(float x) {",
        "quad_sum(float x) {\n    if (threadIdx.x & 16) return x;",
        "divergence: reached __s[a-z_]+ while others of its group wait in __s[a-z_]+",
    ),
    "a mask without half of the lanes": Bug(
        SOFTMAX, "all_lanes = 0xffffffffu", "all_lanes = 0x0000ffffu", "__[a-z_]+_sync: the mask leaves lanes out"
    ),
    "a thread that returns before a barrier": Bug(
        FORWARD,
        "        __syncthreads();  // this step's tile",
        "        if (threadIdx.x == 37) return;\n        __syncthreads();  //",
        "deadlock: the block waits in __syncthreads with 127 of 128 threads; 1 of 128 threads returned",
    ),
    "a thread that returns before its warp's collectives": Bug(
        FORWARD,
        KERNEL_START,
        f"{KERNEL_START}\n    if (threadIdx.x == 37) return;",
        "deadlock: warp 1 waits in __syncwarp with 31 of 32 threads; the block waits in __syncthreads with 96 of 128 "
        "threads; 1 of 128 threads returned",
    ),
    "shared memory that nobody wrote": Bug(
        FORWARD,
        "KeyTile::load<head_dim, 16, 32>(warp_memory,",
        "if (lane < 0) KeyTile::load<head_dim, 16, 32>(warp_memory,",
        "never written",
    ),
    "new keys behind the end of a page": Bug(
        APPEND, "position -= number * sequences.page_size;", "", "global store .* outside of every tensor", Appending()
    ),
    "new keys beyond the capacity": Bug(
        APPEND,
        "length < params.key_length - (source - first)",
        "true",
        "global load .* outside of every tensor",
        Appending(),
    ),
    "a token that is stored twice": Bug(
        APPEND,
        "i64 row = i64(blockIdx.x)",
        "i64 row = i64(blockIdx.x / 2)",
        "[kv]_cache has been written there before",
        Appending(),
    ),
    "no barrier among the warps that count": Bug(SCAN, "__syncthreads();", "", UNORDERED, Scanning()),
    "counts that are overwritten too early": Bug(
        SCAN, "buffer ^= 1", "buffer ^= 0", "shared (load|store) .* race with a (read|write) by thread", Scanning()
    ),
}
