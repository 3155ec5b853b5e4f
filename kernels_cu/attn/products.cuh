// The two matrix products of a warp's 16 rows in 16 bits, through mma.sync: scores = Q K^T and out += P V.
#pragma once

#include <attn/tile.cuh>
#include <common/types.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/math.cuh>
#include <ptx/mma.cuh>

namespace cuattn {

// columns: a multiple of 16, of which the tiles in shared memory hold tile_dim. keys: those of a step. held: whether a
// warp keeps its query rows in registers.
template <int columns, int tile_dim, int keys, bool bfloat16, bool held = true>
struct MmaProducts {
    using Rows = Tile<tile_dim>;
    struct Query {
        u32 rows, fragment[held ? columns / 16 : 1][4];
    };
    using Scores = float[keys / 8][4];
    using Out = float[columns / 8][4];

    // The warp's 16 rows, which start at the shared address `rows`.
    __device__ __forceinline__ static void load_query(Query& query, u32 rows, int lane) {
        query.rows = rows;
#pragma unroll
        for (int k = 0; held && k < columns / 16; ++k) load_fragment(query.fragment[k], rows, k, lane);
    }

    // Groups of 16 columns ascending.
    __device__ __forceinline__ static void multiply_keys(Scores& score, Query& query, u32 key_rows, int lane) {
        const int row = (lane & 7) + (lane >> 4) * 8, unit = (lane >> 3) & 1;
#pragma unroll
        for (int b = 0; b < keys / 8; ++b) score[b][0] = score[b][1] = score[b][2] = score[b][3] = 0.0f;
#pragma unroll
        for (int k = 0; k < columns / 16; ++k) {
            const u32(&fragment)[4] = query.fragment[held ? k : 0];
            if (!held) load_fragment(query.fragment[0], query.rows, k, lane);
#pragma unroll
            for (int b = 0; b < keys / 8; b += 2) {
                u32 key[4];
                ptx::ldmatrix_x4(key, key_rows + Rows::offset(row + 8 * b, unit + 2 * k));
                ptx::mma_m16n8k16<bfloat16>(score[b], fragment, key[0], key[1]);
                ptx::mma_m16n8k16<bfloat16>(score[b + 1], fragment, key[2], key[3]);
            }
        }
    }

    // Weights from block first_block on, rounded to the input type; groups of 16 keys ascending. The output's columns
    // start at first_column of the values' rows.
    template <int blocks>
    __device__ __forceinline__ static void multiply_values(Out& out, const float (&weight)[blocks][4], u32 value_rows,
                                                           int lane, int first_block = 0, int first_column = 0) {
#pragma unroll
        for (int k = 0; k < keys / 16; ++k) {
            u32 packed[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = &weight[first_block + 2 * k + i / 2][2 * (i & 1)];
                packed[i] = ptx::pack_16bit<bfloat16>(pair[0], pair[1]);
            }
#pragma unroll
            for (int b = 0; b < columns / 8; b += 2) {
                u32 value[4];
                ptx::ldmatrix_x4_trans(
                    value, value_rows + Rows::offset(16 * k + (lane & 15), first_column / 8 + b + (lane >> 4)));
                ptx::mma_m16n8k16<bfloat16>(out[b], packed, value[0], value[1]);
                ptx::mma_m16n8k16<bfloat16>(out[b + 1], packed, value[2], value[3]);
            }
        }
    }

    // The first of the two columns of a lane's out[b][0] and out[b][1].
    __device__ __forceinline__ static int out_column(int b, int lane) { return 8 * b + 2 * (lane & 3); }

  private:
    // Columns 16 k to 16 k + 15 of the query rows.
    __device__ __forceinline__ static void load_fragment(u32 (&fragment)[4], u32 rows, int k, int lane) {
        ptx::ldmatrix_x4(fragment, rows + Rows::offset(lane & 15, 2 * k + (lane >> 4)));
    }
};

}  // namespace cuattn
