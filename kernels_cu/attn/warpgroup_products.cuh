// The two matrix products of a warpgroup's 64 rows, from tiles in panels (tile.cuh) in shared memory: scores = Q K^T and
// out += P V. Each is a group of products that runs on until it is waited for. Results are held as in ptx/wgmma.cuh.
#pragma once

#include <common/types.cuh>
#include <ptx/math.cuh>
#include <ptx/wgmma.cuh>

namespace cuattn {

// held: groups of 16 columns of the queries that are in registers. columns: those of the output. keys: of a tile.
template <bool bfloat16, int head_dim, int held, int columns, int keys>
struct WarpgroupProducts {
    using Scores = float[keys / 8][4];
    using Out = float[columns / 8][4];
    using Weights = u32[keys / 16][4];  // in the form of a left operand
    using Queries = u32[held > 0 ? held : 1][4];

    // Groups of 16 columns ascending, the first ones' queries from registers, the others' from shared memory.
    __device__ __forceinline__ static void multiply_keys(Scores& score, const Queries& query, u32 query_rows,
                                                         u32 key_rows) {
        const u64 queries = ptx::wgmma_rows(query_rows), tile = ptx::wgmma_rows(key_rows);
#pragma unroll
        for (int k = 0; k < (head_dim + 15) / 16; ++k) {
            const u64 right = ptx::wgmma_advance(tile, k / 4 * keys * 128 + k % 4 * 32);
            if (k < held) {
                ptx::wgmma_registers<bfloat16, false>(score, query[k < held ? k : 0], right, k > 0);
            } else {
                ptx::wgmma_shared<bfloat16>(score, ptx::wgmma_advance(queries, k / 4 * 64 * 128 + k % 4 * 32), right,
                                            k > 0);
            }
        }
        ptx::wgmma_commit();
    }

    // Groups of 16 keys ascending; `adds`: to what is in `out`, else to zeros.
    __device__ __forceinline__ static void multiply_values(Out& out, const Weights& weight, u32 value_rows, bool adds) {
        const u64 tile = ptx::wgmma_columns(value_rows, keys * 128);
#pragma unroll
        for (int k = 0; k < keys / 16; ++k) {
            ptx::wgmma_registers<bfloat16, true>(out, weight[k], ptx::wgmma_advance(tile, k * 16 * 128), k > 0 || adds);
        }
        ptx::wgmma_commit();
    }

    // Weights rounded to the element type.
    __device__ __forceinline__ static void pack(Weights& weight, const Scores& score) {
#pragma unroll
        for (int k = 0; k < keys / 16; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = &score[2 * k + i / 2][2 * (i & 1)];
                weight[k][i] = ptx::pack_16bit<bfloat16>(pair[0], pair[1]);
            }
        }
    }
};

}  // namespace cuattn
