// The two matrix products of a warp's 16 rows: scores = Q K^T and out += P V. Results are blocks of 8 columns: r[b][c]
// belongs to row lane / 4 + 8 (c / 2) and column 8 b + 2 (lane % 4) + c % 2.
#pragma once

#include <attn/fragments.cuh>
#include <attn/tile.cuh>
#include <common/types.cuh>

namespace cuattn {

// columns: a multiple of the fragments' depth (of outputs 16), of which the tiles in shared memory hold tile_dim. keys:
// those of a step. held: whether a warp keeps its query rows in registers.
template <class Fragments, int columns, int tile_dim, int keys, bool held = true>
struct Products {
    using Rows = Tile<tile_dim, sizeof(typename Fragments::Element)>;
    using Scores = float[keys / 8][4];
    using Out = float[columns / 8][4];
    static constexpr int groups = columns / Fragments::depth;
    struct Query {
        u32 rows;
        typename Fragments::Left left[held ? groups : 1];
    };
    static_assert(columns % Fragments::depth == 0 && keys % 16 == 0);

    // The warp's 16 rows, which start at the shared address `rows`.
    __device__ __forceinline__ static void load_query(Query& query, u32 rows, int lane) {
        query.rows = rows;
#pragma unroll
        for (int k = 0; held && k < groups; ++k) query.left[k] = Fragments::template load_left<Rows>(rows, k, lane);
    }

    // Groups of columns ascending.
    __device__ __forceinline__ static void multiply_keys(Scores& score, Query& query, u32 key_rows, int lane) {
#pragma unroll
        for (int b = 0; b < keys / 8; ++b) score[b][0] = score[b][1] = score[b][2] = score[b][3] = 0.0f;
#pragma unroll(held ? groups : Fragments::unrolled)
        for (int k = 0; k < groups; ++k) {
            if (!held) query.left[0] = Fragments::template load_left<Rows>(query.rows, k, lane);
#pragma unroll
            for (int b = 0; b < keys / 8; b += 2) {
                Fragments::multiply_add(score[b], score[b + 1], query.left[held ? k : 0],
                                        Fragments::template load_right<Rows>(key_rows, 8 * b, k, lane));
            }
        }
    }

    // Weights from block first_block on; groups of keys ascending. The output's columns start at first_column of the
    // values' rows. Of many groups in one piece ptxas holds the products of most at a time, and spills: a loop takes them
    // in two halves.
    template <int blocks>
    __device__ __forceinline__ static void multiply_values(Out& out, const float (&weight)[blocks][4], u32 value_rows,
                                                           int lane, int first_block = 0, int first_column = 0) {
        constexpr int bytes = sizeof(typename Fragments::Element), half = keys / 16;
        constexpr bool whole_lines = columns * bytes % 128 == 0;  // then first_column has no part in the XOR of units
        if (whole_lines) value_rows += first_column * bytes;
        const int column = whole_lines ? 0 : first_column;
        if constexpr (keys / Fragments::depth <= Fragments::most_groups) {
            add_values<keys>(out, weight, first_block, value_rows, column, lane);
        } else {
#pragma unroll 1
            for (int second = 0; second < 2; ++second) {
                float part[half][4];
#pragma unroll
                for (int b = 0; b < half; ++b) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        part[b][c] = second ? weight[first_block + half + b][c] : weight[first_block + b][c];
                    }
                }
                add_values<keys / 2>(out, part, 0, value_rows + second * (keys / 2 * Rows::row_bytes), column, lane);
            }
        }
    }

  private:
    // The groups of `some_keys` keys.
    template <int some_keys, int blocks>
    __device__ __forceinline__ static void add_values(Out& out, const float (&weight)[blocks][4], int first_block,
                                                      u32 value_rows, int column, int lane) {
#pragma unroll
        for (int k = 0; k < some_keys / Fragments::depth; ++k) {
            const typename Fragments::Left left =
                Fragments::from_result(weight, first_block * 8 / Fragments::depth + k);
#pragma unroll
            for (int b = 0; b < columns / 8; b += 2) {
                Fragments::multiply_add(
                    out[b], out[b + 1], left,
                    Fragments::template load_right_columns<Rows>(value_rows, k, column + 8 * b, lane));
            }
        }
    }
};

}  // namespace cuattn
