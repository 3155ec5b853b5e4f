// The two matrix products of a warp's 16 rows in fp32, in fused multiply-adds: every element is a chain over columns, or
// keys, ascending. Scores are held as in products.cuh.
#pragma once

#include <attn/softmax.cuh>
#include <attn/tile.cuh>
#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

// columns: a multiple of 8 (of outputs 16), of which the tiles in shared memory hold tile_dim. keys: those of a step.
template <int columns, int tile_dim, int keys>
struct FmaProducts {
    using Rows = Tile<tile_dim, 4>;
    using Query = u32;  // stays in shared memory: the address of the warp's 16 rows
    using Scores = float[keys / 8][4];
    using Out = float[columns / 8][4];

    __device__ __forceinline__ static void load_query(Query& query, u32 rows, int) { query = rows; }

    __device__ __forceinline__ static void multiply_keys(Scores& score, const Query& query, u32 key_rows, int lane) {
        const int row = lane / 4, key = 2 * (lane & 3);
#pragma unroll
        for (int b = 0; b < keys / 8; ++b) score[b][0] = score[b][1] = score[b][2] = score[b][3] = 0.0f;
#pragma unroll 1
        for (int unit = 0; unit < columns / 4; ++unit) {
            const float4 q[2] = {ptx::load_shared_f32x4(query + Rows::offset(row, unit)),
                                 ptx::load_shared_f32x4(query + Rows::offset(row + 8, unit))};
#pragma unroll
            for (int b = 0; b < keys / 8; ++b) {
                const float4 k[2] = {ptx::load_shared_f32x4(key_rows + Rows::offset(8 * b + key, unit)),
                                     ptx::load_shared_f32x4(key_rows + Rows::offset(8 * b + key + 1, unit))};
#pragma unroll
                for (int c = 0; c < 4; ++c) score[b][c] = dot(q[c / 2], k[c & 1], score[b][c]);
            }
        }
    }

    template <int blocks>
    __device__ __forceinline__ static void multiply_values(Out& out, const float (&weight)[blocks][4], u32 value_rows,
                                                           int lane, int first_block, int first_column) {
        const int unit = first_column / 4 + (lane & 3);
#pragma unroll
        for (int j = 0; j < keys; ++j) {
            const int owner = (lane & ~3) | (j % 8) / 2;  // the lane that holds key j's weights
            const float p[2] = {__shfl_sync(all_lanes, weight[first_block + j / 8][j & 1], owner),
                                __shfl_sync(all_lanes, weight[first_block + j / 8][2 + (j & 1)], owner)};
#pragma unroll
            for (int b = 0; b < columns / 8; b += 2) {
                const float4 v = ptx::load_shared_f32x4(value_rows + Rows::offset(j, unit + 2 * b));
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    out[b][2 * row] = __fmaf_rn(p[row], v.x, out[b][2 * row]);
                    out[b][2 * row + 1] = __fmaf_rn(p[row], v.y, out[b][2 * row + 1]);
                    out[b + 1][2 * row] = __fmaf_rn(p[row], v.z, out[b + 1][2 * row]);
                    out[b + 1][2 * row + 1] = __fmaf_rn(p[row], v.w, out[b + 1][2 * row + 1]);
                }
            }
        }
    }

    // The first of the two columns of a lane's out[b][0] and out[b][1]: a lane has four neighbouring ones in two blocks.
    __device__ __forceinline__ static int out_column(int b, int lane) {
        return 16 * (b / 2) + 4 * (lane & 3) + 2 * (b & 1);
    }

  private:
    __device__ __forceinline__ static float dot(float4 a, float4 b, float sum) {
        sum = __fmaf_rn(a.x, b.x, sum);
        sum = __fmaf_rn(a.y, b.y, sum);
        sum = __fmaf_rn(a.z, b.z, sum);
        return __fmaf_rn(a.w, b.w, sum);
    }
};

}  // namespace cuattn
