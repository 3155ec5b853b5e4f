// The two matrix products of a warp's 16 rows, through mma.sync: scores = Q K^T and out += P V.
#pragma once

#include <attn/tile.cuh>
#include <common/types.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/math.cuh>
#include <ptx/mma.cuh>

namespace cuattn {

// head_dim: a multiple of 16, of which the tiles in shared memory hold tile_dim columns.
template <int head_dim, int tile_dim, int key_tile, bool bfloat16>
struct WarpProducts {
    using Rows = Tile<tile_dim>;
    using Scores = float[key_tile / 8][4];
    using Out = float[head_dim / 8][4];

    // Groups of 16 columns of head_dim ascending.
    __device__ __forceinline__ static void multiply_keys(Scores& score, const u32 (&query)[head_dim / 16][4], u32 keys,
                                                         int lane) {
        const int row = (lane & 7) + (lane >> 4) * 8, unit = (lane >> 3) & 1;
#pragma unroll
        for (int b = 0; b < key_tile / 8; ++b) score[b][0] = score[b][1] = score[b][2] = score[b][3] = 0.0f;
#pragma unroll
        for (int k = 0; k < head_dim / 16; ++k) {
#pragma unroll
            for (int b = 0; b < key_tile / 8; b += 2) {
                u32 key[4];
                ptx::ldmatrix_x4(key, keys + Rows::offset(row + 8 * b, unit + 2 * k));
                ptx::mma_m16n8k16<bfloat16>(score[b], query[k], key[0], key[1]);
                ptx::mma_m16n8k16<bfloat16>(score[b + 1], query[k], key[2], key[3]);
            }
        }
    }

    // Weights rounded to the input type; groups of 16 keys ascending.
    __device__ __forceinline__ static void multiply_values(Out& out, const Scores& weight, u32 values, int lane) {
#pragma unroll
        for (int k = 0; k < key_tile / 16; ++k) {
            u32 packed[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = &weight[2 * k + i / 2][2 * (i & 1)];
                packed[i] = ptx::pack_16bit<bfloat16>(pair[0], pair[1]);
            }
#pragma unroll
            for (int b = 0; b < head_dim / 8; b += 2) {
                u32 value[4];
                ptx::ldmatrix_x4_trans(value, values + Rows::offset(16 * k + (lane & 15), b + (lane >> 4)));
                ptx::mma_m16n8k16<bfloat16>(out[b], packed, value[0], value[1]);
                ptx::mma_m16n8k16<bfloat16>(out[b + 1], packed, value[2], value[3]);
            }
        }
    }
};

}  // namespace cuattn
