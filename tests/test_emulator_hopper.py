"""Hopper's asynchronous units as the emulator has them: their results, and mistakes in their use that it finds."""

import numpy as np
import numpy.typing as npt
import pytest
from hopper_kernels import TILE, Bug, Case, Product, chained, numbers, padded

from cuattn import emulator

DTYPES = {"bfloat16": "true", "float16": "false"}


def start_of(rows: int, columns: int) -> npt.NDArray[np.float32]:
    random = np.random.default_rng(columns)
    return np.ldexp(random.standard_normal((rows, columns)), random.integers(-20, 20, (rows, columns))).astype("f4")


def rows_case(
    dtype: str, columns: int, started: bool = True, rows: int = 64, depth: int = 64, in_registers: bool = False
) -> Case:
    """left right^T of single tiles, of which the tensors need not fill everything; left from registers or not."""
    left, right = numbers(dtype, (rows, depth), 1), numbers(dtype, (min(columns, 90), depth), 2)
    start = start_of(64, columns) if started else None
    whole = np.zeros((64, depth), np.uint16), np.zeros((columns, depth), np.uint16)
    for big, small in zip(whole, (left, right), strict=True):
        big[: len(small)] = small
    kernel = f"product_of_rows<{DTYPES[dtype]}, {columns // 8}, {str(in_registers).lower()}>"
    shared = TILE + columns * 128 + 8
    product = Product(kernel, padded(left), padded(right), columns, (64, columns), shared, start, rows=64)
    return Case(product, chained(dtype, *whole, start))


def columns_case(dtype: str, columns: int, started: bool = True, depth: int = 64) -> Case:
    left, right = numbers(dtype, (64, depth), 3), numbers(dtype, (depth, columns), 4)
    start = start_of(64, columns) if started else None
    panels = -(-columns // 64)
    kernel = f"product_of_columns<{DTYPES[dtype]}, {columns // 8}>"
    shared = (1 + panels) * TILE + 8
    product = Product(kernel, padded(left), padded(right), columns, (64, 64), shared, start)
    return Case(product, chained(dtype, left, np.ascontiguousarray(right.T), start))


def stored_case(dtype: str) -> Case:
    left, right = numbers(dtype, (64, 64), 5), numbers(dtype, (64, 64), 6)
    product = Product(f"product_of_stored<{DTYPES[dtype]}>", left, right, 64, (64, 64), 3 * TILE)
    return Case(product, chained(dtype, left, right))


def ring_case(dtype: str, depth: int = 300) -> Case:
    left, right = numbers(dtype, (100, depth), 7), numbers(dtype, (90, depth), 8)
    kernel, shared = f"ring<{DTYPES[dtype]}>", 10 * TILE + 1024
    product = Product(kernel, padded(left), padded(right), 90, (128, 64), shared, threads=384, blocks=2)
    return Case(product, chained(dtype, left, right))


def turns_case() -> Case:
    nothing = np.zeros((6, 64), np.uint16)
    product = Product("turns", nothing, nothing, 32, (1, 1), 32, threads=64)
    return Case(product, np.repeat(np.arange(6, dtype=np.uint32), 32).reshape(6, 32))


@pytest.mark.parametrize("dtype", DTYPES)
class TestProducts:
    """Every bit is that of mma_m16n8k16 over the same groups of 16 columns."""

    @pytest.mark.parametrize("columns", [64, 128])
    def test_tiles_in_shared_memory(self, dtype: str, columns: int) -> None:
        for started in (False, True):
            for in_registers in (False, True):
                rows_case(dtype, columns, started, in_registers=in_registers).check()

    @pytest.mark.parametrize("columns", [64, 96, 128, 192, 256])
    def test_left_tile_in_registers(self, dtype: str, columns: int) -> None:
        for started in (False, True):
            columns_case(dtype, columns, started).check()

    @pytest.mark.parametrize("schedule", emulator.SCHEDULES)
    def test_tensors_end_inside_of_tiles(self, dtype: str, schedule: str) -> None:
        rows_case(dtype, 128, rows=37, depth=43).check(schedule)
        columns_case(dtype, 96, depth=21).check(schedule)

    def test_tiles_that_threads_store(self, dtype: str) -> None:
        for schedule in emulator.SCHEDULES:
            stored_case(dtype).check(schedule)

    def test_ring(self, dtype: str) -> None:
        for schedule, seed in (("ascending", 1), ("descending", 1), *(("random", seed) for seed in range(5))):
            for depth in (8, 300):
                ring_case(dtype, depth).check(schedule, seed)


def test_infinities_and_zeros() -> None:
    """A row of zeros meets an infinity, and one of negative zeros a start of negative zero."""
    case = rows_case("float16", 64)
    product = case.product
    product.left[3], product.left[5], product.left[7:9] = 0, 0x8000, 0
    product.right[4, 9], product.right[5, 2] = 0x7C00, 0x7E00
    assert product.start is not None
    product.start[5], product.start[8, 0] = -0.0, np.inf
    np.testing.assert_array_equal(product.run(), chained("float16", product.left, product.right, product.start))


CASES = {
    "ring": lambda: ring_case("bfloat16"),
    "stored": lambda: stored_case("bfloat16"),
    "rows": lambda: rows_case("bfloat16", 64),
    "turns": turns_case,
}
EMPTY_ARRIVAL = "if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive("
FULL_WAIT = "ptx::mbarrier_wait(full + stage * 8, step / stages % 2);"
EXPECT = "ptx::mbarrier_arrive_expect(full + stage * 8, stage_bytes"
ROWS_WAIT = "    ptx::wgmma_commit();\n    ptx::wgmma_wait<0>();\n    store(d, params, 0, 0);\n}\n\n// The same with"
STORED_START = "    float d[8][4];\n    ptx::wgmma_fence();"
BUGS = {
    "nobody says that a stage is free": Bug(
        EMPTY_ARRIVAL,
        "if (threadIdx.x < 0) ptx::mbarrier_arrive(",
        r"deadlock: .*the mbarrier at 0x[0-9a-f]+ in phase 0 misses 2 of 2 arrivals and 0 bytes; 1 of its threads "
        "wait, one of them thread 256, for the first time",
    ),
    "one warpgroup does not say that a stage is free": Bug(
        EMPTY_ARRIVAL, EMPTY_ARRIVAL.replace("threadIdx.x %", "threadIdx.x + 0 *"), "misses 1 of 2 arrivals"
    ),
    "all threads say that a stage is free": Bug(
        EMPTY_ARRIVAL, "ptx::mbarrier_arrive(", "while it waited for phase 0 began the mbarrier .* in phase [0-9]+"
    ),
    "more bytes are expected than come": Bug(
        EXPECT, f"{EXPECT} + 128", r"deadlock: .* misses 0 of 1 arrivals and 128 bytes; 256 of its threads wait"
    ),
    "fewer bytes are expected than come": Bug(
        EXPECT,
        f"{EXPECT} - tile_bytes",
        "a copy to there has not been waited for|misses 0 of 1 arrivals and -8192 bytes",
    ),
    "a stage is read before it is there": Bug(FULL_WAIT, "", "a copy to there has not been waited for|never written"),
    "the parity of a stage is wrong": Bug(
        FULL_WAIT, FULL_WAIT.replace("% 2", "% 2 ^ 1"), "a copy to there has not been waited for|never written"
    ),
    "a stage is loaded while it is read": Bug(
        "ptx::mbarrier_wait(empty + stage * 8, (step / stages + 1) % 2);",
        "",
        "wgmma still reads there|race with a read by wgmma of warpgroup|a copy to there has not been waited for|"
        "mbarrier_arrive_expect: more than 1 arrivals",
    ),
    "a stage is free before its products are done": Bug(
        "ptx::wgmma_wait<1>();", "", "wgmma still reads there|race with a read by wgmma of warpgroup"
    ),
    "a copy that nobody waits for": Bug(
        "step < steps; ++step) {\n                const int",
        "step < steps + 1; ++step) {\n                const int",
        "ends: (nobody has waited for a copy that counts at the mbarrier|copies are under way)",
    ),
    "results before their wait": Bug(
        ROWS_WAIT, ROWS_WAIT.replace("<0>", "<1>"), "result of wgmma used before its wait", "rows"
    ),
    "results of the last step before their wait": Bug(
        "ptx::wgmma_wait<0>();\n        ptx::wgmma_hold",
        "ptx::wgmma_wait<1>();\n        ptx::wgmma_hold",
        "result of wgmma used before its wait",
    ),
    "results that are scaled under way": Bug(
        ROWS_WAIT,
        ROWS_WAIT.replace("commit();", "commit();\n    d[2][1] = __fmul_rn(d[2][1], 2.0f);"),
        "result of wgmma used before its wait",
        "rows",
    ),
    "results that are overwritten under way": Bug(
        ROWS_WAIT,
        ROWS_WAIT.replace("commit();", "commit();\n    d[2][1] = 0.0f;"),
        "a register was written that a wgmma under way adds to",
        "rows",
    ),
    "no fence before the first product": Bug(
        STORED_START, "    float d[8][4];", "no wgmma_fence since the last wgmma_wait", "stored"
    ),
    "no fence after a wait": Bug(
        "            ptx::wgmma_fence();\n",
        "            if (step == 0) ptx::wgmma_fence();\n",
        "no wgmma_fence since the last wgmma_wait",
    ),
    "no commit": Bug(
        ROWS_WAIT, ROWS_WAIT.replace("ptx::wgmma_commit();", ""), "no wgmma_commit of the last products", "rows"
    ),
    "neither commit nor wait": Bug(
        ROWS_WAIT,
        ROWS_WAIT.replace("ptx::wgmma_commit();\n    ptx::wgmma_wait<0>();\n    store(d", "if (d == nullptr) store(d"),
        "returns without wgmma_commit of its last products",
        "rows",
    ),
    "no wait": Bug(
        ROWS_WAIT,
        ROWS_WAIT.replace("ptx::wgmma_wait<0>();\n    store(d", "if (d == nullptr) store(d"),
        "returns without wgmma_wait for its last products",
        "rows",
    ),
    "a warp without a product": Bug(
        "    ptx::wgmma_fence();\n    if constexpr (in_registers)",
        "    if (threadIdx.x < 32) return;\n    ptx::wgmma_fence();\n    if constexpr (in_registers)",
        "deadlock: warpgroup 0 waits in wgmma_shared with 96 of 128 threads",
        "rows",
    ),
    "warps with different products": Bug(
        STORED_START + "\n    multiply_rows<bfloat16>(d, left, right, false);",
        STORED_START + "\n    multiply_rows<bfloat16>(d, threadIdx.x < 32 ? right : left, right, false);",
        "divergence: threads of a warpgroup give wgmma_shared different operands",
        "stored",
    ),
    "stores that the tensor cores do not see": Bug(
        "    store_tile(right, params.right);\n    ptx::fence_async_proxy();",
        "    store_tile(right, params.right);",
        "a store by thread [0-9]+ is not visible to the asynchronous proxy: no fence_async_proxy after it",
        "stored",
    ),
    "a fence before the stores": Bug(
        "    store_tile(right, params.right);\n    ptx::fence_async_proxy();",
        "    ptx::fence_async_proxy();\n    store_tile(right, params.right);",
        "a store by thread [0-9]+ is not visible to the asynchronous proxy",
        "stored",
    ),
    "no barrier after the stores": Bug(
        "    ptx::fence_async_proxy();\n    __syncthreads();",
        "    ptx::fence_async_proxy();",
        "wgmma of 4 bytes .* (race with a write by thread|never written)",
        "stored",
    ),
    "a store to what products read": Bug(
        STORED_START + "\n    multiply_rows<bfloat16>(d, left, right, false);",
        STORED_START + "\n    multiply_rows<bfloat16>(d, left, right, false);\n"
        "    ptx::store_shared_u32(left + threadIdx.x * 4, 0u);",
        "shared store .* wgmma still reads there",
        "stored",
    ),
    "no barrier after the barriers' initialisation": Bug(
        "    __syncthreads();\n    if (warpgroup == loader)",
        "    if (warpgroup == loader)",
        "race with the initialisation of the mbarrier|no mbarrier has been initialised",
    ),
    "no fence after the barriers' initialisation": Bug(
        "        ptx::mbarrier_init_fence();\n    }",
        "    }",
        "tma_load_4d: no mbarrier_init_fence for the mbarrier",
    ),
    "an initialised barrier again": Bug(
        "ptx::mbarrier_init(empty + i * 8, 2)", "ptx::mbarrier_init(full + i * 8, 2)", "is an mbarrier already"
    ),
    "an ordinary store to a barrier": Bug(
        "    if (warpgroup == loader) {",
        "    if (threadIdx.x == 5) ptx::store_shared_u32(full, 0u);\n    if (warpgroup == loader) {",
        "shared store .* is an mbarrier",
    ),
    "a misaligned barrier": Bug(
        "full = tiles + stages * stage_bytes,",
        "full = tiles + stages * stage_bytes + 4,",
        "mbarrier_init .* misaligned",
    ),
    "a barrier outside of shared memory": Bug(
        "empty = full + stages * 8;", "empty = full + 0x40000;", "mbarrier_init .* outside of shared memory"
    ),
    "tiles at a multiple of 512": Bug(
        "tiles = shared_start(),", "tiles = shared_start() + 512,", "tma_load_4d .* misaligned: not a multiple of 1024"
    ),
    "products of tiles at a multiple of 512": Bug(
        "const u32 left = shared_start(), right = left + tile_bytes;",
        "const u32 left = shared_start(), right = left + tile_bytes + 512;",
        "wgmma .* misaligned: the tile is not at a multiple of 1024",
        "stored",
    ),
    "warps that do not wait for each other": Bug(
        "        ptx::barrier_sync<128>(1 + warpgroup);\n",
        "",
        "shared load .* (race with a write by thread|never written)",
    ),
    "warps that only arrive": Bug(
        "ptx::barrier_sync<128>(1 + warpgroup);",
        "ptx::barrier_arrive<128>(1 + warpgroup);",
        "shared load .* (race with a write by thread|never written)",
    ),
    "a barrier for warps that do not come": Bug(
        "barrier_sync<128>(1", "barrier_sync<256>(1", "deadlock: .*barrier 1 of 256 threads has warps 0, 1, 2, 3;"
    ),
    "warps that disagree on a barrier": Bug(
        "ptx::barrier_sync<128>(1 + warpgroup);",
        "threadIdx.x % 128 < 32 ? ptx::barrier_sync<64>(1 + warpgroup) : ptx::barrier_sync<128>(1 + warpgroup);",
        "barrier_sync: barrier [12] of (64|128) threads, which others take for one of (64|128)",
    ),
    "barrier 16": Bug("barrier_sync<128>(1 + warpgroup)", "barrier_sync<128>(16)", "barrier_sync: no barrier 16"),
    "more registers than there are": Bug(
        "claim_registers<240>",
        "claim_registers<248>",
        r"more registers than there are: 248 \+ 248 \+ 24 for each thread of the warpgroups, of 504",
    ),
    "a word is written while it is read": Bug(
        "            ptx::mbarrier_wait(read, (row + 1) % 2);\n",
        "",
        "while it waited for phase 0 began the mbarrier|deadlock: .* misses 1 of 1 arrivals",
        "turns",
    ),
    "a word is read after it was said so": Bug(
        "            ptx::store_global_u32(params.out + row * 32 + lane, ptx::load_shared_u32(word));\n"
        "            ptx::mbarrier_arrive(read);\n",
        "            ptx::mbarrier_arrive(read);\n"
        "            ptx::store_global_u32(params.out + row * 32 + lane, ptx::load_shared_u32(word));\n",
        "shared store .* race with a read by thread",
        "turns",
    ),
    "some lanes do not say that they read": Bug(
        "            ptx::mbarrier_arrive(read);\n",
        "            if (lane < 16) ptx::mbarrier_arrive(read), ptx::mbarrier_arrive(read);\n",
        "shared store .* race with a read by thread",
        "turns",
    ),
    "a lane that speaks for others": Bug(
        "            ptx::mbarrier_arrive(read);\n",
        "            if (lane == 0) {\n"
        "                for (int i = 0; i < 32; ++i) ptx::mbarrier_arrive(read);\n"
        "            }\n",
        "shared store .* race with a read by thread",
        "turns",
    ),
    "a warp that keeps its registers": Bug(
        "        ptx::claim_registers<240>();",
        "        if (threadIdx.x >= 32) ptx::claim_registers<240>();",
        "warps of one warpgroup asked for different numbers of registers",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str) -> None:
    BUGS[name].check(CASES[BUGS[name].kernel]().product)


@pytest.mark.parametrize("kernel", CASES)
def test_kernels_without_a_bug(kernel: str) -> None:
    """Control of the above."""
    for schedule in emulator.SCHEDULES:
        CASES[kernel]().check(schedule)
