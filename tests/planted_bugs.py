"""Changes of the kernels that make small emulated problems wrong."""

from typing import NamedTuple, Protocol

from planted_problems import Appending, Backward, FewRows, ManyRows, Scanning


class Runnable(Protocol):
    def run(self, schedule: str = "ascending", seed: int = 1) -> object: ...


class Bug(NamedTuple):
    """One change of one file of the kernels, and a pattern of what the emulator says about it; None: only bits tell."""

    file: str
    old: str
    new: str
    error: str | None
    problem: Runnable = ManyRows()


FORWARD, EPILOGUE, SOFTMAX = "forward_sm80.cuh", "attn/epilogue.cuh", "attn/softmax.cuh"
COLUMNS, COMBINE = "forward_columns.cuh", "combine.cuh"
PLACES, WORK, CHUNKS = "attn/places.cuh", "attn/work.cuh", "attn/chunks.cuh"
APPEND, SCAN, COMPACTION = "append_kv.cuh", "scan_mask.cuh", "attn/compaction.cuh"
KEYS, QUERIES, ROWS, COMPACT = (
    *("backward_keys.cuh", "backward_queries.cuh", "backward_rows.cuh", "compact_rows.cuh"),
)
STORE_ROW = "ptx::store_global_u32x4_if(exists && unit < units, to.out + unit * 8,"
MERGED = "return memory_ + (threadIdx.x & 31) * 16"
KERNEL_START = "SharedMemory& shared = *static_cast<SharedMemory*>(ptx::dynamic_shared());"
STORE_PAIR = "                store_pair<float32, bfloat16>(params.out, start + column"
UNORDERED = "race with a (read|write) by thread|never written|a copy to there has not been waited for"
BUGS = {
    "no barrier in the main loop": Bug(FORWARD, "        __syncthreads();  // this step's tile", "//", UNORDERED),
    "no barrier among the lanes that load queries": Bug(
        FORWARD, "ptx::cp_async_wait<lookahead>();\n    __syncwarp();", "ptx::cp_async_wait<lookahead>();", UNORDERED
    ),
    "no barrier among the lanes that share a row": Bug(
        CHUNKS,
        "__syncwarp();  // the four lanes",
        "//",
        "shared (load|store) .* race with a (read|write) by thread",
        ManyRows(len_k=1200),
    ),
    "waits for too few copies": Bug(
        FORWARD, "cp_async_wait<lookahead - 1>", "cp_async_wait<lookahead>", "a copy to there has not been waited for"
    ),
    "loads into a tile in use": Bug(
        FORWARD, "load(block_step + lookahead);", "load(block_step + lookahead + 1);", UNORDERED
    ),
    "reads behind the last key": Bug(
        PLACES,
        "existing = sequence_.key_length - start;",
        "existing = rows;",
        r"cp\.async of 16 bytes .* outside of every tensor .*k \d+ of 38400",
    ),
    "reads behind the last query": Bug(
        FORWARD,
        "query_length - warp_row, lane",
        "query_length * 0 + 16, lane",
        r"cp\.async of 16 bytes .* outside of every tensor .*q \d+ of 9216",
    ),
    "writes behind shared memory": Bug(
        CHUNKS, MERGED, MERGED.replace("memory_", "memory_ + 0x40000"), "outside of shared memory", ManyRows(len_k=1200)
    ),
    "writes before shared memory": Bug(
        CHUNKS,
        MERGED,
        MERGED.replace("memory_", "memory_ % 16 - 0x8000"),
        "outside of shared memory",
        ManyRows(len_k=1200),
    ),
    "a shared object that is not there": Bug(
        FORWARD, "shared_address(shared.rows[warp])", "shared_address(shared.rows[99])", "not in shared memory"
    ),
    "a misaligned load": Bug(
        CHUNKS,
        "ptx::load_shared_f32x4(row_slot())",
        "ptx::load_shared_f32x4(row_slot() + 4)",
        "shared load of 16 bytes .* misaligned",
        ManyRows(len_k=1200),
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
        STORE_ROW.replace("exists", "exists && row != 3"),
        r"^out: 320 elements were not written, the first at \(0, 0, 3, 0\)",
    ),
    "a store between the rows": Bug(
        EPILOGUE,
        STORE_ROW,
        f"if (exists && row == 3) ptx::store_global_u32x4(to.out + 64 + unit * 8, uint4{{}});\n{STORE_ROW}",
        r"^out: 640 bytes between its elements were written",
        ManyRows(row_stride=2),
    ),
    "a collective without half of its lanes": Bug(
        SOFTMAX,
        "quad_sum(float x) {",
        "quad_sum(float x) {\n    if (threadIdx.x & 16) return x;",
        "deadlock: warp 0 waits in __shfl_xor_sync with 16 of 32 threads",
    ),
    "a collective that half of its lanes pass over": Bug(
        SOFTMAX,
        "quad_max(float x) {",
        "quad_max(float x) {\n    if (threadIdx.x & 16) return x;",
        "divergence: reached (__[a-z_]+|a vote) while others of its group wait in (__[a-z_]+|a vote)",
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
    "no barrier among the warps that count": Bug(COMPACTION, "__syncthreads();", "", UNORDERED, Scanning()),
    "counts that are overwritten too early": Bug(
        COMPACTION,
        "buffer ^= 1",
        "buffer ^= 0",
        "shared (load|store) .* race with a (read|write) by thread",
        Scanning(),
    ),
    "no barrier between a block's groups": Bug(
        COLUMNS,
        "__syncthreads();  // the block's earlier rows",
        "//",
        UNORDERED,
        FewRows(batch=2),
    ),
    "no barrier among the warps that share rows": Bug(
        COLUMNS,
        "ptx::cp_async_wait<lookahead - 1>();\n        __syncthreads();",
        "ptx::cp_async_wait<lookahead - 1>();",
        UNORDERED,
        FewRows(),
    ),
    "a fold that starts in the middle": Bug(
        COLUMNS, "work.first_chunk == 0 && !to_caller()", "!to_caller()", "never written", FewRows()
    ),
    "partial sums of single lanes": Bug(
        COLUMNS, "statistics.sum[0] = quad_sum(statistics.sum[0]);", "", None, FewRows()
    ),
    "a group that nobody merges": Bug(
        COLUMNS, "goes_on ? work.chunks : 0", "0", r"^out: \d+ elements were not written", FewRows()
    ),
    "keys that a row does not see": Bug(
        COLUMNS,
        "+ key_tile > seen_by_all",
        "< 0",
        None,
        FewRows(len_q=9, len_k=100),
    ),
    "partial results in another block's place": Bug(
        WORK,
        ": range_of(group_place)",
        ": int(blockIdx.x)",
        "has not been written there",
        FewRows(batch=4, len_q=1),
    ),
    "columns behind the values": Bug(
        "attn/results.cuh",
        f"if (column < value_dim) {{\n{STORE_PAIR}",
        f"if (column < value_dim + 8) {{\n{STORE_PAIR}",
        "global store .* (outside of every tensor|out has been written there before)",
        FewRows(len_k=100, value_dim=24, dtype="float32"),
    ),
    "rows that neither kernel takes": Bug(
        "attn/groups.cuh",
        "rows <= params.forward.sequences.few_rows",
        "rows < params.forward.sequences.few_rows",
        r"^out: \d+ elements were not written",
        FewRows(batch=2, len_q=72, len_k=200, starts=(0, 32, 72)),
    ),
    "a page that does not exist": Bug(
        "attn/sequence.cuh",
        ", sequences.page_count - 1u)",
        ", ~0u)",
        r"cp\.async of 16 bytes .* outside of every tensor",
        FewRows(page_size=16, wrong_page=True),
    ),
    "places of one tile alone": Bug(
        PLACES,
        "tables_ + (tile % tiles * key_tile + threadIdx.x) * 4",
        "tables_ + threadIdx.x * 4",
        UNORDERED,
        FewRows(page_size=16),
    ),
    "a merge that starts one chunk late": Bug(
        COMBINE, "(partials, index, folded, chunks", "(partials, index, folded + 1, chunks", None, FewRows()
    ),
    "keys that do not exist": Bug(
        SCAN,
        "mask + place * params.token_stride) != 0",
        "mask + place * params.token_stride) < 2",
        None,
        FewRows(padded=True),
    ),
    "no barrier between steps of rows": Bug(
        KEYS,
        "            __syncthreads();  // this step's rows",
        "            // this step's rows",
        UNORDERED,
        Backward(),
    ),
    "rows are copied before their records are there": Bug(
        KEYS,
        "        ptx::cp_async_wait<0>();\n        __syncthreads();\n        load_step();",
        "        load_step();",
        UNORDERED,
        Backward(),
    ),
    "scores are read before they are there": Bug(
        KEYS,
        "            turn_ ^= 1;\n            __syncthreads();",
        "            turn_ ^= 1;",
        UNORDERED,
        Backward(head_dim=192),
    ),
    "one room for scores": Bug(KEYS, "turn_ ^= 1;", "turn_ ^= 0;", UNORDERED, Backward(head_dim=192)),
    "groups of rows start anywhere": Bug(
        KEYS, "last_without / 16 * 16", "last_without", None, Backward(len_q=150, len_k=300, dtype="float32")
    ),
    "places without a key are forgotten": Bug(
        KEYS,
        "            if (is_key) continue;",
        "            continue;",
        "dk: .* elements were not written",
        Backward(),
    ),
    "rows that do not contribute are counted": Bug(
        COMPACT, "&params.rows[start + row].visible) > 0;", "&params.rows[start + row].visible) >= 0;", None, Backward()
    ),
    "a dlse that is forgotten": Bug(ROWS, "sum = __fsub_rn(sum, dlse);", "", None, Backward()),
    "no barrier between steps of keys": Bug(
        QUERIES, "        __syncthreads();  // this step's keys", "        // this step's keys", UNORDERED, Backward()
    ),
    "gradients of rows behind the end": Bug(
        QUERIES, "        if (number >= end.query_length) continue;\n", "", "global store", Backward()
    ),
}
